package trust

import (
	"time"

	"timonel/state"
)

// Revocation is the record of a public key that is good for nothing any more,
// whatever certificate it comes with.
type Revocation struct {
	Key    string    `json:"key"`
	Of     string    `json:"of"` // whose it was
	At     time.Time `json:"at"`
	By     string    `json:"by,omitempty"`
	Reason string    `json:"reason,omitempty"`
}

// maxLifetime is how long a certificate of this cluster may be valid, those of
// before included; a revocation is kept as long at least.
const maxLifetime = 366 * 24 * time.Hour

// revocation writes the record of a revoked key. It stays for as long as a
// certificate of that key could be valid: expires if that is known, and always for
// a while that clocks differ by.
func (r *Registry) revocation(rev Revocation, expires time.Time) state.Change {
	until := rev.At.Add(maxLifetime)
	if expires.After(until) {
		until = expires
	}
	return put(revokedPrefix+rev.Key, rev, until.Add(24*time.Hour))
}

// Revoked says whether a public key was revoked.
func (r *Registry) Revoked(key string) bool { return r.revoked(r.state.Store().View(), key) }

// revoked needs no reading of the record: that it is there is enough.
func (r *Registry) revoked(view state.View, key string) bool {
	_, found := view.Get(revokedPrefix + key)
	return found
}

// Revocations are the keys that were revoked.
func (r *Registry) Revocations() []Revocation {
	return all[Revocation](r.state.Store().View(), revokedPrefix, func(error) {})
}
