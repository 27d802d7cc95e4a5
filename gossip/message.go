package gossip

import (
	"bytes"
	"compress/lzw"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// What members send one another is memberlist's. Whoever has a key may send
// anything, so it is looked through before memberlist decodes it, which believes
// the lengths that it reads.

// Kinds of messages, memberlist's numbers.
const (
	kindPing         = 0
	kindIndirectPing = 1
	kindAck          = 2
	kindSuspect      = 3
	kindAlive        = 4
	kindDead         = 5
	kindPushPull     = 6
	kindCompound     = 7
	kindCompressed   = 9
	kindEncrypted    = 10
	kindNack         = 11
	kindCRC          = 12
	kindError        = 13
)

// Bounds of one message.
const (
	maxPacket  = 4096    // bytes of a packet, unpacked; memberlist sends 1,400
	maxName    = 253     // of a member
	maxMessage = 1 << 10 // bytes of a text or of bytes in a message
)

var errMessage = errors.New("not a message of a member")

// openPacket returns the message in a packet that was opened: its checksum is
// checked, what is compressed is unpacked, and each part is whole and of a kind that
// members send.
func openPacket(b []byte) ([]byte, error) {
	if len(b) > maxPacket {
		return nil, fmt.Errorf("%w: a packet of %d bytes", errMessage, len(b))
	}
	if len(b) > 5 && b[0] == kindCRC {
		if crc32.ChecksumIEEE(b[5:]) != binary.BigEndian.Uint32(b[1:5]) {
			return nil, fmt.Errorf("%w: its checksum is wrong", errMessage)
		}
		b = b[5:]
	}
	b, err := unpack(b, maxPacket)
	if err != nil {
		return nil, err
	}
	if len(b) > 0 && b[0] == kindCompound {
		return b, checkCompound(b[1:])
	}
	return b, checkPart(b)
}

func checkCompound(b []byte) error {
	if len(b) < 1 || len(b) < 1+2*int(b[0]) {
		return fmt.Errorf("%w: a list of parts that is cut off", errMessage)
	}
	lengths, rest := b[1:1+2*int(b[0])], b[1+2*int(b[0]):]
	for ; len(lengths) > 0; lengths = lengths[2:] {
		n := int(binary.BigEndian.Uint16(lengths))
		if n > len(rest) {
			return fmt.Errorf("%w: a part that is cut off", errMessage)
		}
		if err := checkPart(rest[:n]); err != nil {
			return err
		}
		rest = rest[n:]
	}
	if len(rest) > 0 {
		return fmt.Errorf("%w: %d bytes too many", errMessage, len(rest))
	}
	return nil
}

// checkPart checks one message of a packet.
func checkPart(b []byte) error {
	if len(b) == 0 {
		return fmt.Errorf("%w: nothing", errMessage)
	}
	switch b[0] {
	case kindPing, kindIndirectPing, kindAck, kindNack, kindSuspect, kindAlive, kindDead:
	default:
		return fmt.Errorf("%w: kind %d in a packet", errMessage, b[0])
	}
	p := packed{b[1:]}
	if err := p.fields(checkField); err != nil {
		return err
	}
	if len(p.b) > 0 {
		return fmt.Errorf("%w: %d bytes too many", errMessage, len(p.b))
	}
	return nil
}

// checkField takes the value of one field of a message.
func checkField(name string, p *packed) error {
	switch name {
	case "Node", "From", "Name", "SourceNode":
		text, err := p.bytes(maxName)
		if err == nil && bytes.ContainsFunc(text, func(r rune) bool { return r < ' ' }) {
			err = fmt.Errorf("%w: a name of control characters", errMessage)
		}
		return err
	}
	return p.skip(0)
}

// openStream returns the message that was sent over a connection, unpacked and
// checked: of most bytes and about most members at most.
func openStream(b []byte, most, members int) ([]byte, error) {
	b, err := unpack(b, most)
	if err != nil {
		return nil, err
	}
	if len(b) == 0 {
		return nil, fmt.Errorf("%w: nothing", errMessage)
	}
	p := packed{b[1:]}
	switch b[0] {
	case kindPing, kindAck, kindError:
		if err := p.fields(checkField); err != nil {
			return nil, err
		}
	case kindPushPull:
		if err := p.checkState(members); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%w: kind %d on a connection", errMessage, b[0])
	}
	if len(p.b) > 0 {
		return nil, fmt.Errorf("%w: %d bytes too many", errMessage, len(p.b))
	}
	return b, nil
}

// checkState checks all that one member says that it knows.
func (p *packed) checkState(most int) error {
	nodes := int64(-1)
	err := p.fields(func(name string, p *packed) (err error) {
		switch name {
		case "Nodes":
			nodes, err = p.integer()
			return err
		case "UserStateLen":
			n, err := p.integer()
			if err == nil && n != 0 {
				err = fmt.Errorf("%w: %d bytes of what no member sends", errMessage, n)
			}
			return err
		}
		return p.skip(0)
	})
	if err != nil {
		return err
	}
	if nodes < 0 || nodes > int64(most) {
		return fmt.Errorf("%w: it is about %d members, and a pool has %d at most", errMessage, nodes, most)
	}
	for range nodes {
		if err := p.fields(checkField); err != nil {
			return err
		}
	}
	return nil
}

// unpack returns what is compressed in b, most bytes of it, or b itself.
func unpack(b []byte, most int) ([]byte, error) {
	if len(b) == 0 || b[0] != kindCompressed {
		return b, nil
	}
	algorithm, content := int64(-1), []byte(nil)
	p := packed{b[1:]}
	err := p.fields(func(name string, p *packed) (err error) {
		switch name {
		case "Algo":
			algorithm, err = p.integer()
		case "Buf":
			content, err = p.bytes(len(b))
		default:
			err = p.skip(0)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if algorithm != 0 || len(p.b) > 0 {
		return nil, fmt.Errorf("%w: compressed in a way that is not known", errMessage)
	}
	from := lzw.NewReader(bytes.NewReader(content), lzw.LSB, 8)
	defer from.Close()
	out, err := io.ReadAll(io.LimitReader(from, int64(most)+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errMessage, err)
	}
	if len(out) > most {
		return nil, fmt.Errorf("%w: more than %d bytes when unpacked", errMessage, most)
	}
	return out, nil
}

// packed is msgpack, of which a value is taken at a time.
type packed struct{ b []byte }

// maxNesting is how deep a value may be in others; memberlist's are flat.
const maxNesting = 4

func (p *packed) take(n int64) ([]byte, error) {
	if n < 0 || n > int64(len(p.b)) {
		return nil, fmt.Errorf("%w: a value that is cut off", errMessage)
	}
	out := p.b[:n]
	p.b = p.b[n:]
	return out, nil
}

func (p *packed) number(size int64) (uint64, error) {
	b, err := p.take(size)
	if err != nil {
		return 0, err
	}
	var n uint64
	for _, c := range b {
		n = n<<8 | uint64(c)
	}
	return n, nil
}

// head reads what a value is: its class, and its length or its own bytes.
func (p *packed) head() (class byte, n int64, err error) {
	first, err := p.take(1)
	if err != nil {
		return 0, 0, err
	}
	sized := func(class byte, size, more int64) (byte, int64, error) {
		n, err := p.number(size)
		if n > 1<<31 {
			return 0, 0, fmt.Errorf("%w: a value of %d bytes", errMessage, n)
		}
		return class, int64(n) + more, err
	}
	switch c := first[0]; {
	case c < 0x80 || c >= 0xe0: // a small number, in this byte
		return 'i', int64(int8(c)), nil
	case c < 0x90:
		return 'm', int64(c & 0x0f), nil
	case c < 0xa0:
		return 'a', int64(c & 0x0f), nil
	case c < 0xc0:
		return 's', int64(c & 0x1f), nil
	case c == 0xc0 || c == 0xc2 || c == 0xc3:
		return 'n', 0, nil
	case c >= 0xc4 && c <= 0xc6:
		return sized('s', 1<<(c-0xc4), 0)
	case c >= 0xc7 && c <= 0xc9:
		return sized('x', 1<<(c-0xc7), 1)
	case c == 0xca || c == 0xcb:
		return 'x', 4 << (c - 0xca), nil
	case c >= 0xcc && c <= 0xcf:
		n, err := p.number(1 << (c - 0xcc))
		if n > 1<<62 {
			return 0, 0, fmt.Errorf("%w: a number of %d", errMessage, n)
		}
		return 'i', int64(n), err
	case c >= 0xd0 && c <= 0xd3:
		size := int64(1) << (c - 0xd0)
		n, err := p.number(size)
		return 'i', int64(n<<(64-8*size)) >> (64 - 8*size), err
	case c >= 0xd4 && c <= 0xd8:
		return 'x', 1 + 1<<(c-0xd4), nil
	case c >= 0xd9 && c <= 0xdb:
		return sized('s', 1<<(c-0xd9), 0)
	case c == 0xdc || c == 0xdd:
		return sized('a', 2<<(c-0xdc), 0)
	case c == 0xde || c == 0xdf:
		return sized('m', 2<<(c-0xde), 0)
	}
	return 0, 0, fmt.Errorf("%w: a value of an unknown form", errMessage)
}

// integer takes a number.
func (p *packed) integer() (int64, error) {
	class, n, err := p.head()
	if err == nil && class != 'i' {
		err = fmt.Errorf("%w: not a number where one should be", errMessage)
	}
	return n, err
}

// bytes takes a text or bytes, most of them at most.
func (p *packed) bytes(most int) ([]byte, error) {
	class, n, err := p.head()
	switch {
	case err != nil:
		return nil, err
	case class == 'n':
		return nil, nil
	case class != 's':
		return nil, fmt.Errorf("%w: no text where one should be", errMessage)
	case n > int64(most):
		return nil, fmt.Errorf("%w: a text of %d bytes, %d are the most", errMessage, n, most)
	}
	return p.take(n)
}

// fields takes a map with names as keys, and has f take each value.
func (p *packed) fields(f func(name string, p *packed) error) error {
	class, n, err := p.head()
	if err != nil {
		return err
	}
	if class != 'm' || n > 64 {
		return fmt.Errorf("%w: not a record", errMessage)
	}
	for range n {
		name, err := p.bytes(64)
		if err != nil {
			return err
		}
		if err := f(string(name), p); err != nil {
			return err
		}
	}
	return nil
}

// skip takes any value.
func (p *packed) skip(depth int) error {
	class, n, err := p.head()
	if err != nil {
		return err
	}
	switch class {
	case 's':
		if n > maxMessage {
			return fmt.Errorf("%w: a text of %d bytes, %d are the most", errMessage, n, maxMessage)
		}
		_, err = p.take(n)
	case 'x':
		_, err = p.take(n)
	case 'a', 'm':
		if class == 'm' {
			n *= 2
		}
		if depth >= maxNesting || n > maxMessage {
			return fmt.Errorf("%w: lists within lists, or long ones", errMessage)
		}
		for range n {
			if err := p.skip(depth + 1); err != nil {
				return err
			}
		}
	}
	return err
}
