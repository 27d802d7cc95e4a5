package gossip

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
)

// KeySize is the length of a key: AES-256.
const KeySize = 32

// maxKeys bounds the keys that a pool takes at a time: each is tried on what comes.
const maxKeys = 4

// The form of what is sealed is memberlist's own, version 1 of its encryption, so
// that members which leave encryption to memberlist can read it.
const (
	sealVersion = 1
	nonceSize   = 12
	tagSize     = 16
	sealSize    = 1 + nonceSize + tagSize // more than what was sealed
)

// errKey means that something was sealed with none of the pool's keys.
var errKey = errors.New("no installed keys could decrypt the message")

// checkKeys says what is wrong with the keys of a pool.
func checkKeys(keys [][]byte) error {
	if len(keys) == 0 || len(keys) > maxKeys {
		return fmt.Errorf("%d keys instead of 1 to %d", len(keys), maxKeys)
	}
	for i, key := range keys {
		if len(key) != KeySize {
			return fmt.Errorf("key %d has %d bytes instead of %d", i+1, len(key), KeySize)
		}
	}
	return nil
}

// ring is what a pool seals with: the first key, and opens with: any.
type ring struct{ keys atomic.Pointer[[]sealer] }

type sealer struct {
	key []byte
	cipher.AEAD
}

// set replaces the keys, which were checked.
func (r *ring) set(keys [][]byte) error {
	out := make([]sealer, 0, len(keys))
	for _, key := range keys {
		block, err := aes.NewCipher(key)
		if err != nil {
			return fmt.Errorf("gossip key: %w", err)
		}
		aead, err := cipher.NewGCM(block)
		if err != nil {
			return fmt.Errorf("gossip key: %w", err)
		}
		out = append(out, sealer{bytes.Clone(key), aead})
	}
	r.keys.Store(&out)
	return nil
}

// has reports that the ring's keys are these, in this order.
func (r *ring) has(keys [][]byte) bool {
	return slices.EqualFunc(*r.keys.Load(), keys, func(s sealer, key []byte) bool { return bytes.Equal(s.key, key) })
}

// seal appends plain, sealed with the first key, to dst.
func (r *ring) seal(dst, plain, with []byte) []byte {
	nonce := make([]byte, nonceSize)
	rand.Read(nonce) // never fails
	dst = append(append(dst, sealVersion), nonce...)
	return (*r.keys.Load())[0].Seal(dst, nonce, plain, with)
}

// open returns what was sealed. It does not change sealed.
func (r *ring) open(sealed, with []byte) ([]byte, error) {
	if len(sealed) < sealSize {
		return nil, fmt.Errorf("%d bytes are too short to be sealed", len(sealed))
	}
	if sealed[0] != sealVersion {
		return nil, fmt.Errorf("unsupported encryption version %d", sealed[0])
	}
	nonce, text := sealed[1:1+nonceSize], sealed[1+nonceSize:]
	for _, s := range *r.keys.Load() {
		if plain, err := s.Open(nil, nonce, text, with); err == nil {
			return plain, nil
		}
	}
	return nil, errKey
}
