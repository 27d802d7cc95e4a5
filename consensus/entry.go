package consensus

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// A log entry of ours is a header and the command:
//
//	0      the cluster version under which it was written (see Config.NewestVersion)
//	1      kind
//	2..17  request id
//	18..25 fence: the only term in which the entry counts, little endian
//	26..29 CRC-32C of bytes 0..25 and the command, little endian
//	30..   command
//
// The fence makes a forwarded entry harmless once its term is over: however
// late a copy is appended, no replica applies it. The checksum catches a log
// page that went bad on one replica before that replica diverges.
//
// The version is what makes an older program stand still, in the middle of its log,
// before it meets what it does not know: every format that a cluster version brings
// comes in entries of that version alone.
const (
	// entryVersion is the newest that this package reads and writes.
	entryVersion    = 3
	entryHeaderSize = 30
)

// ErrNewerVersion is wrapped by what is refused because it was written by a program
// newer than this one.
var ErrNewerVersion = errors.New("it was written by a newer program: run that one")

type entryKind byte

const (
	kindCommand entryKind = 1 // for the state machine
	kindMarker  entryKind = 2 // first entry of a leader's term; carries no command
)

// requestID tells the replica that waits for an entry which one is its own.
type requestID [16]byte

func newRequestID() (id requestID) {
	rand.Read(id[:]) // never fails
	return id
}

type entry struct {
	version byte // 0 is taken for 1
	kind    entryKind
	id      requestID
	term    uint64
	command []byte
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encode returns the entry's bytes for the log; the command is copied.
func (e entry) encode() []byte {
	b := make([]byte, entryHeaderSize+len(e.command))
	b[0], b[1] = max(e.version, 1), byte(e.kind)
	copy(b[2:18], e.id[:])
	binary.LittleEndian.PutUint64(b[18:26], e.term)
	copy(b[entryHeaderSize:], e.command)
	binary.LittleEndian.PutUint32(b[26:30], entrySum(b))
	return b
}

func entrySum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:26], castagnoli), castagnoli, b[entryHeaderSize:])
}

// decodeEntry reads what encode wrote. The command shares b's memory.
func decodeEntry(b []byte) (entry, error) {
	if len(b) < entryHeaderSize {
		return entry{}, fmt.Errorf("%d bytes are too few for an entry", len(b))
	}
	if b[0] > entryVersion {
		return entry{}, fmt.Errorf("%w (entry of cluster version %d, this program knows up to %d)", ErrNewerVersion, b[0], entryVersion)
	}
	if b[0] == 0 {
		return entry{}, errors.New("it has no version")
	}
	if binary.LittleEndian.Uint32(b[26:30]) != entrySum(b) {
		return entry{}, fmt.Errorf("checksum does not match")
	}
	e := entry{version: b[0], kind: entryKind(b[1]), term: binary.LittleEndian.Uint64(b[18:26]), command: b[entryHeaderSize:]}
	copy(e.id[:], b[2:18])
	if e.kind != kindCommand && e.kind != kindMarker {
		return entry{}, fmt.Errorf("%w (entry of kind %d)", ErrNewerVersion, e.kind)
	}
	return e, nil
}
