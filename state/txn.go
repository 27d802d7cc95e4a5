package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// Condition is what must hold of a key for a transaction to be done.
type Condition struct {
	Key string
	// ModRevision is 0 when the key must not exist, else the revision of the
	// key's last change.
	ModRevision int64
}

// Change is one put or delete.
type Change struct {
	Key   string
	Value []byte
	// Delete removes the key; Value and ExpiresAt are then ignored. Deleting a
	// key that does not exist changes nothing and takes no revision.
	Delete bool
	// ExpiresAt is the time in Unix seconds after which the leader deletes the
	// key, 0 for never.
	ExpiresAt int64
}

// Txn is the command of a log entry: if all conditions hold, all changes are
// done in order, each at its own revision; else nothing is done.
type Txn struct {
	Conditions []Condition
	Changes    []Change
	// Time is the proposer's clock in Unix seconds, 0 if not given. Nothing follows
	// from it: each replica has a clock of its own for its history.
	Time int64
	// Compact drops the history up to and including this revision, 0 for none.
	// It is done whether or not the conditions hold.
	Compact int64
}

// ErrMalformed is wrapped by every error about bytes that are not a command.
var ErrMalformed = errors.New("malformed command")

const (
	txnVersion = 1

	flagDelete  = 1 << 0
	flagExpires = 1 << 1
)

// Marshal encodes t: a version byte, then counts, lengths and numbers as varints.
func (t *Txn) Marshal() []byte {
	size := 1 + 4*binary.MaxVarintLen64
	for i := range t.Conditions {
		size += len(t.Conditions[i].Key) + 2*binary.MaxVarintLen64
	}
	for i := range t.Changes {
		size += len(t.Changes[i].Key) + len(t.Changes[i].Value) + 1 + 3*binary.MaxVarintLen64
	}
	b := make([]byte, 0, size)
	b = append(b, txnVersion)
	b = binary.AppendVarint(b, t.Time)
	b = binary.AppendVarint(b, t.Compact)
	b = binary.AppendUvarint(b, uint64(len(t.Conditions)))
	for i := range t.Conditions {
		b = appendString(b, t.Conditions[i].Key)
		b = binary.AppendVarint(b, t.Conditions[i].ModRevision)
	}
	b = binary.AppendUvarint(b, uint64(len(t.Changes)))
	for i := range t.Changes {
		c := &t.Changes[i]
		switch {
		case c.Delete:
			b = append(b, flagDelete)
			b = appendString(b, c.Key)
		case c.ExpiresAt != 0:
			b = append(b, flagExpires)
			b = appendString(b, c.Key)
			b = appendBytes(b, c.Value)
			b = binary.AppendVarint(b, c.ExpiresAt)
		default:
			b = append(b, 0)
			b = appendString(b, c.Key)
			b = appendBytes(b, c.Value)
		}
	}
	return b
}

// Unmarshal replaces t with the transaction encoded in b. It copies what it
// keeps, so b may be used again. On an error, which wraps [ErrMalformed] or
// [ErrNewerVersion], t is left as it was.
func (t *Txn) Unmarshal(b []byte) error {
	d := decoder{b: b}
	var out Txn
	if v := d.byte("version"); d.err == nil && v > txnVersion {
		return fmt.Errorf("%w (command of version %d, this program reads %d)", ErrNewerVersion, v, txnVersion)
	} else if d.err == nil && v == 0 {
		d.fail("no version")
	}
	out.Time = d.varint("time")
	out.Compact = d.varint("compact revision")
	if d.err == nil && (out.Time < 0 || out.Compact < 0) {
		return fmt.Errorf("%w: negative time or compact revision", ErrMalformed)
	}
	// The smallest condition and change take two bytes: that bounds what a
	// corrupt count can make us allocate.
	if n := d.count("conditions", 2); n > 0 {
		out.Conditions = make([]Condition, n)
		for i := range out.Conditions {
			c := &out.Conditions[i]
			c.Key = d.string("condition key")
			if c.ModRevision = d.varint("condition revision"); c.ModRevision < 0 {
				d.fail("negative condition revision")
			}
		}
	}
	if n := d.count("changes", 2); n > 0 {
		out.Changes = make([]Change, n)
		for i := range out.Changes {
			c := &out.Changes[i]
			flags := d.byte("change flags")
			c.Key = d.string("change key")
			switch flags {
			case flagDelete:
				c.Delete = true
				continue
			case flagExpires:
				c.Value = d.bytes("change value")
				if c.ExpiresAt = d.varint("expiry"); c.ExpiresAt <= 0 {
					d.fail("expiry that is not a time")
				}
			case 0:
				c.Value = d.bytes("change value")
			default:
				if d.err == nil { // rather than damage: the log has a checksum
					return fmt.Errorf("%w (change flags %#x)", ErrNewerVersion, flags)
				}
			}
			if d.err != nil {
				break
			}
		}
	}
	if d.err == nil && len(d.b) > 0 {
		d.fail("bytes after the end")
	}
	if d.err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, d.err)
	}
	*t = out
	return nil
}

func appendString(b []byte, s string) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func appendBytes(b, s []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// decoder reads varint-framed fields and remembers the first error.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail(what string) {
	if d.err == nil {
		d.err = errors.New(what)
		d.b = nil
	}
}

func (d *decoder) byte(what string) byte {
	if len(d.b) == 0 {
		d.fail("truncated " + what)
		return 0
	}
	v := d.b[0]
	d.b = d.b[1:]
	return v
}

func (d *decoder) uvarint(what string) uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail("truncated " + what)
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) varint(what string) int64 {
	v, n := binary.Varint(d.b)
	if n <= 0 {
		d.fail("truncated " + what)
		return 0
	}
	d.b = d.b[n:]
	return v
}

// count reads a number of things of at least size bytes each.
func (d *decoder) count(what string, size int) int {
	v := d.uvarint("number of " + what)
	if v > uint64(len(d.b)/size) || v > math.MaxInt32 {
		d.fail("more " + what + " than bytes")
		return 0
	}
	return int(v)
}

func (d *decoder) raw(what string) []byte {
	n := d.uvarint("length of " + what)
	if d.err != nil {
		return nil
	}
	if n > uint64(len(d.b)) {
		d.fail("truncated " + what)
		return nil
	}
	v := d.b[:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) string(what string) string { return string(d.raw(what)) }

// bytes returns a copy that is never nil.
func (d *decoder) bytes(what string) []byte {
	v := d.raw(what)
	if len(v) == 0 {
		return []byte{}
	}
	return bytes.Clone(v)
}
