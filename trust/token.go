package trust

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"timonel/state"
)

// Bounds of a token.
const (
	DefaultTokenTTL = 24 * time.Hour
	MaxTokenTTL     = 365 * 24 * time.Hour
	maxTokenNames   = 1024
	maxDescription  = 256

	// BootstrapToken is the id of the token that comes with a cluster's secrets.
	BootstrapToken = "bootstrap"
)

// Token is a join token's record. The secret is not in it.
type Token struct {
	ID   string `json:"id"`
	Hash string `json:"hash"` // SHA-256 of the secret
	// Names are the nodes that may join with it; empty for any.
	Names []string `json:"names,omitempty"`
	// Uses is how many nodes may join with it, 0 for any number, and Used how many
	// have.
	Uses        int       `json:"uses,omitempty"`
	Used        int       `json:"used,omitempty"`
	Description string    `json:"description,omitempty"`
	Created     time.Time `json:"created"`
	Expires     time.Time `json:"expires"`
	By          string    `json:"by,omitempty"`
}

// TokenSpec says what a new token is for.
type TokenSpec struct {
	TTL         time.Duration // default 24 h
	Uses        int           // 0: any number
	Names       []string
	Description string
	By          string
}

// validate names the field that is wrong.
func (s *TokenSpec) validate() error {
	if s.TTL == 0 {
		s.TTL = DefaultTokenTTL
	}
	if s.TTL < time.Second || s.TTL > MaxTokenTTL {
		return fmt.Errorf("ttl: %s is not between 1s and %s", s.TTL, MaxTokenTTL)
	}
	if s.Uses < 0 {
		return fmt.Errorf("uses: %d is below 0", s.Uses)
	}
	if len(s.Names) > maxTokenNames {
		return fmt.Errorf("names: %d are more than %d", len(s.Names), maxTokenNames)
	}
	for _, name := range s.Names {
		if err := CheckNodeName(name); err != nil {
			return fmt.Errorf("names: %w", err)
		}
	}
	if len(s.Description) > maxDescription {
		return fmt.Errorf("description: %d characters are more than %d", len(s.Description), maxDescription)
	}
	return nil
}

// CreateToken makes a token and returns its record and the secret that an agent
// shows, which is not kept. Its errors about the spec name the field.
func (r *Registry) CreateToken(ctx context.Context, spec TokenSpec) (Token, string, error) {
	if err := spec.validate(); err != nil {
		return Token{}, "", &RefusedError{Reason: err.Error()}
	}
	random := make([]byte, 5+16)
	rand.Read(random) // never fails
	id, secret := hex.EncodeToString(random[:5]), hex.EncodeToString(random[5:])
	now := r.now().UTC().Truncate(time.Second)
	names := slices.Clone(spec.Names)
	slices.Sort(names)
	token := Token{
		ID: id, Hash: hashSecret(secret), Names: slices.Compact(names), Uses: spec.Uses, Description: spec.Description,
		Created: now, Expires: now.Add(spec.TTL), By: spec.By,
	}
	err := r.change(ctx, func(state.View, time.Time) (*state.Txn, error) {
		return putNew(tokenPrefix+id, token, token.Expires), nil
	})
	if err != nil {
		return Token{}, "", fmt.Errorf("create join token: %w", err)
	}
	return token, id + "-" + secret, nil
}

// putNew is the transaction that makes a record if there is none under key.
func putNew(key string, record any, expires time.Time) *state.Txn {
	return &state.Txn{Conditions: []state.Condition{{Key: key}}, Changes: []state.Change{put(key, record, expires)}}
}

// put writes a record that goes by itself at expires, if that is not zero.
func put(key string, record any, expires time.Time) state.Change {
	c := state.Change{Key: key, Value: encode(record)}
	if !expires.IsZero() {
		c.ExpiresAt = max(1, expires.Unix())
	}
	return c
}

// Tokens are the tokens that have not expired, by id.
func (r *Registry) Tokens() []Token {
	now := r.now()
	out := all[Token](r.state.Store().View(), tokenPrefix, func(error) {})
	return slices.DeleteFunc(out, func(t Token) bool { return !now.Before(t.Expires) })
}

// RevokeToken deletes a token: nobody joins with it any more. Its error wraps
// [ErrNotFound].
func (r *Registry) RevokeToken(ctx context.Context, id string) error {
	return r.change(ctx, func(view state.View, _ time.Time) (*state.Txn, error) {
		kv, ok := view.Get(tokenPrefix + id)
		if !ok {
			return nil, fmt.Errorf("join token %q: %w", id, ErrNotFound)
		}
		return &state.Txn{
			Conditions: []state.Condition{{Key: kv.Key, ModRevision: kv.ModRevision}},
			Changes:    []state.Change{{Key: kv.Key, Delete: true}},
		}, nil
	})
}

func hashSecret(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// ErrToken is the one answer to every wrong secret, so that nobody learns which
// ids there are.
var ErrToken = errors.New("the join token is wrong, expired, used up or revoked: make one with `timonel token create`")

// maxSecret bounds what is hashed of what a caller shows.
const maxSecret = 256

// token finds the record of the token that was shown: "ID-SECRET", or the secret
// that came with the cluster's.
func (r *Registry) token(view state.View, now time.Time, shown string) (Token, int64, error) {
	if len(shown) > maxSecret {
		return Token{}, 0, ErrToken
	}
	id, secret, ok := strings.Cut(shown, "-")
	if !ok {
		id, secret = BootstrapToken, shown
	}
	if id == "" || secret == "" || strings.Contains(id, "/") {
		return Token{}, 0, ErrToken
	}
	token, revision, found, err := get[Token](view, tokenPrefix+id)
	if err != nil {
		return Token{}, 0, err
	}
	// The same work whether or not there is such a token.
	same := subtle.ConstantTimeCompare([]byte(hashSecret(secret)), []byte(token.Hash)) == 1
	if !found || !same || !now.Before(token.Expires) {
		return Token{}, 0, ErrToken
	}
	return token, revision, nil
}
