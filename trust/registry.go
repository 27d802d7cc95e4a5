package trust

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"timonel/state"
)

// Keys of the records.
const (
	Prefix = "/timonel/trust/"

	tokenPrefix   = Prefix + "tokens/"
	nodePrefix    = Prefix + "nodes/"
	revokedPrefix = Prefix + "revoked/"
	foundingKey   = Prefix + "founding"
)

// State is a replica of the state. The API server's storage works on the same.
type State interface {
	// Commit commits a transaction and returns its result when this replica has
	// applied it. An error means that it is not known to be committed.
	Commit(ctx context.Context, txn *state.Txn) (state.Result, error)
	// ReadBarrier returns when this replica has applied everything that was
	// committed anywhere before the call.
	ReadBarrier(ctx context.Context) error
	// Store is this replica's state.
	Store() *state.Store
}

// Config says what a Registry works with.
type Config struct {
	// State is required.
	State State
	// Reserved says whose name a node may not have, and why: "" for a name that is
	// free. It is asked besides the names that are reserved always. Default: none.
	Reserved func(name string) (why string)
	// Vault seals the keys of gossip. It is required for what is about them.
	Vault Vault
	// Now is the clock. Default [time.Now].
	Now func() time.Time
}

// Registry reads and changes the records. It keeps nothing itself; its methods may
// be called from many goroutines.
type Registry struct {
	state    State
	reserved func(name string) string
	vault    Vault
	now      func() time.Time
	// turn is held by the one that changes records: many that join at once through
	// this controller would only make each other begin anew.
	turn chan struct{}
}

// New returns a registry of the records in c.State.
func New(c Config) *Registry {
	r := &Registry{state: c.State, reserved: c.Reserved, vault: c.Vault, now: c.Now, turn: make(chan struct{}, 1)}
	if r.reserved == nil {
		r.reserved = func(string) string { return "" }
	}
	if r.now == nil {
		r.now = time.Now
	}
	return r
}

// By says who makes a change, for the record.
type By struct {
	User   string
	Reason string
}

// RefusedError says that somebody is not who he says he is, or may not do what he
// asks for. Asking again does not help.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return e.Reason }

func refuse(format string, args ...any) error {
	return &RefusedError{Reason: fmt.Sprintf(format, args...)}
}

// ErrNotFound is wrapped when there is no record of the name that was given.
var ErrNotFound = errors.New("not found")

// KeyOf identifies a certificate's public key: the SHA-256 of its
// SubjectPublicKeyInfo in hexadecimal digits.
func KeyOf(cert *x509.Certificate) string { return KeyOfInfo(cert.RawSubjectPublicKeyInfo) }

// KeyOfInfo is [KeyOf] for a SubjectPublicKeyInfo, DER.
func KeyOfInfo(publicKeyInfo []byte) string {
	sum := sha256.Sum256(publicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// format is the first byte of every record. A record of another format was
// written by a later program.
const format = '1'

func encode(record any) []byte {
	raw, err := json.Marshal(record)
	if err != nil {
		panic(fmt.Sprintf("encode %T: %v", record, err)) // plain structs: cannot happen
	}
	return append([]byte{format}, raw...)
}

// decode reads a record. Who cannot read it must not go on as if it were not
// there.
func decode[T any](kv state.KV) (record T, err error) {
	if len(kv.Value) == 0 || kv.Value[0] != format {
		return record, fmt.Errorf("record %s is of another format than this program's: run a newer version", kv.Key)
	}
	if err := json.Unmarshal(kv.Value[1:], &record); err != nil {
		return record, fmt.Errorf("record %s: %w", kv.Key, err)
	}
	return record, nil
}

// get reads the record under key; found is false without one.
func get[T any](view state.View, key string) (record T, revision int64, found bool, err error) {
	kv, found := view.Get(key)
	if !found {
		return record, 0, false, nil
	}
	record, err = decode[T](kv)
	return record, kv.ModRevision, true, err
}

// all reads the records under prefix in the order of their keys. One that cannot
// be read is passed over with each.
func all[T any](view state.View, prefix string, unreadable func(error)) (out []T) {
	for kv := range view.Range(prefix, "") {
		record, err := decode[T](kv)
		if err != nil {
			unreadable(err)
			continue
		}
		out = append(out, record)
	}
	return out
}

// attempts bounds how often a transaction is made anew because somebody else
// changed the same records.
const attempts = 64

// change reads the newest state, lets decide make a transaction of it, and commits
// that; when a record that it depends on has changed meanwhile, all of it again.
// decide returns nil when there is nothing to do. Whoever is refused, or changes
// nothing, does not wait for those who do.
func (r *Registry) change(ctx context.Context, decide func(view state.View, now time.Time) (*state.Txn, error)) error {
	if err := r.state.ReadBarrier(ctx); err != nil {
		return err
	}
	if txn, err := decide(r.state.Store().View(), r.now()); err != nil || txn == nil {
		return err
	}
	select {
	case r.turn <- struct{}{}:
		defer func() { <-r.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for range attempts {
		now := r.now()
		txn, err := decide(r.state.Store().View(), now)
		if err != nil || txn == nil {
			return err
		}
		txn.Time = now.Unix()
		result, err := r.state.Commit(ctx, txn)
		if err == nil {
			err = result.Err
		}
		if err != nil {
			return err
		}
		if result.Succeeded {
			return nil
		}
		// The state here is now one in which a condition does not hold.
	}
	return fmt.Errorf("the records of this name are changed by somebody else all the time: gave up after %d attempts", attempts)
}

// Changes is what [Registry.Follow] tells.
type Changes struct {
	// Reset says that anything may have changed.
	Reset bool
	// Nodes are names of nodes whose record changed.
	Nodes []string
	// Revoked are the keys that were revoked.
	Revoked []string
	// Gossip says that keys of gossip changed.
	Gossip bool
	// Keys are all keys that changed, those of other records included.
	Keys []string
}

// Follow calls f with what changes, in order, until ctx ends, whose error it
// returns. The first call has Reset set. When f is called, the state here has the
// changes already.
func (r *Registry) Follow(ctx context.Context, f func(Changes)) error {
	store := r.state.Store()
	for {
		watcher, err := store.Watch(Prefix, 0)
		if err != nil {
			return fmt.Errorf("follow who is who: %w", err)
		}
		f(Changes{Reset: true})
		err = follow(ctx, watcher, f)
		watcher.Close()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !errors.Is(err, state.ErrCompacted) {
			return fmt.Errorf("follow who is who: %w", err)
		}
	}
}

func follow(ctx context.Context, watcher *state.Watcher, f func(Changes)) error {
	for {
		events, err := watcher.Next(ctx)
		if err != nil {
			return err
		}
		var c Changes
		for _, e := range events {
			key := e.KV.Key
			c.Keys = append(c.Keys, key)
			if name, ok := strings.CutPrefix(key, nodePrefix); ok {
				c.Nodes = append(c.Nodes, name)
			} else if hash, ok := strings.CutPrefix(key, revokedPrefix); ok && e.Type == state.Put {
				c.Revoked = append(c.Revoked, hash)
			} else if strings.HasPrefix(key, gossipPrefix) {
				c.Gossip = true
			}
		}
		f(c)
	}
}
