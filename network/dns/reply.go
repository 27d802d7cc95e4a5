package dns

import (
	"encoding/binary"
	"net/netip"

	"github.com/miekg/dns"
)

// maxUDP bounds what is sent in one datagram, whatever a client says that it takes.
const maxUDP = 4096

// maxTCP is what a message can be at most.
const maxTCP = 65535

// name is a name as it is in messages, without compression.
type name []byte

// appendLabels appends labels to a name that is still open.
func appendLabels(b []byte, labels ...string) []byte {
	for _, l := range labels {
		b = append(b, byte(len(l)))
		b = append(b, l...)
	}
	return b
}

// nameOf is a name of its text, such as an ExternalName; nil if it cannot be one.
func nameOf(text string) name {
	for len(text) > 0 && text[len(text)-1] == '.' {
		text = text[:len(text)-1]
	}
	var out name
	for start := 0; start <= len(text); {
		end := start
		for end < len(text) && text[end] != '.' {
			end++
		}
		if end == start || end-start > 63 {
			return nil
		}
		out = appendLabels(out, text[start:end])
		start = end + 1
	}
	if out = append(out, 0); len(out) > maxName {
		return nil
	}
	return out
}

// reply is an answer that is being written. What does not fit is left out, and said
// to be when it is of the answer section.
type reply struct {
	b     []byte
	limit int
	q     *query
}

const (
	answerSection     = 6 // where in the header it is counted
	authoritySection  = 8
	additionalSection = 10
)

// newReply begins an answer in buf.
func newReply(buf []byte, q *query, rcode int, authoritative bool, limit int) *reply {
	flags := uint16(flagQR|flagRA) | q.opcode<<11 | uint16(rcode&0xf)
	if q.rd {
		flags |= flagRD
	}
	if q.cd {
		flags |= flagCD
	}
	if authoritative {
		flags |= flagAA
	}
	b := binary.BigEndian.AppendUint16(buf[:0], q.id)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	if q.question != nil {
		b[5] = 1
		b = append(b, q.question...)
	}
	if q.edns {
		limit -= optSize
	}
	return &reply{b: b, limit: limit, q: q}
}

// pointer is a name of the question from its nth byte on.
func pointer(n int) name { return name{0xc0 | byte((headerSize+n)>>8), byte(headerSize + n)} }

// add writes a record, and says whether it fitted.
func (r *reply) add(section int, owner name, kind uint16, ttl uint32, data []byte) bool {
	if len(r.b)+len(owner)+10+len(data) > r.limit {
		if section == answerSection {
			r.b[2] |= flagTC >> 8
		}
		return false
	}
	r.b = append(r.b, owner...)
	r.b = binary.BigEndian.AppendUint16(r.b, kind)
	r.b = binary.BigEndian.AppendUint16(r.b, dns.ClassINET)
	r.b = binary.BigEndian.AppendUint32(r.b, ttl)
	r.b = binary.BigEndian.AppendUint16(r.b, uint16(len(data)))
	r.b = append(r.b, data...)
	binary.BigEndian.PutUint16(r.b[section:], binary.BigEndian.Uint16(r.b[section:])+1)
	return true
}

// addresses writes those of kind's family, beginning with the turn-th.
func (r *reply) addresses(section int, owner name, kind uint16, ttl uint32, list []netip.Addr, turn uint32) {
	for i := range list {
		ip := list[(i+int(turn%uint32(len(list))))%len(list)]
		if !ofKind(ip, kind) {
			continue
		}
		var raw [16]byte
		data := raw[:0]
		if ip.Is4() {
			four := ip.As4()
			data = append(data, four[:]...)
		} else {
			raw = ip.As16()
			data = raw[:]
		}
		if !r.add(section, owner, kind, ttl, data) {
			return
		}
	}
}

// ofKind says whether an address is of A or of AAAA.
func ofKind(ip netip.Addr, kind uint16) bool {
	return kind == dns.TypeA && ip.Is4() || kind == dns.TypeAAAA && !ip.Is4()
}

// finish ends the answer, with EDNS where the client speaks it.
func (r *reply) finish(rcode int) []byte {
	if !r.q.edns {
		return r.b
	}
	return appendOPT(r.b, r.q, rcode)
}

func appendOPT(b []byte, q *query, rcode int) []byte {
	b = append(b, 0)
	b = binary.BigEndian.AppendUint16(b, dns.TypeOPT)
	b = binary.BigEndian.AppendUint16(b, maxUDP)
	ttl := uint32(rcode>>4) << 24
	if q.do {
		ttl |= 1 << 15
	}
	b = binary.BigEndian.AppendUint32(b, ttl)
	b = append(b, 0, 0)
	binary.BigEndian.PutUint16(b[additionalSection:], binary.BigEndian.Uint16(b[additionalSection:])+1)
	return b
}

// refuse is an answer that says no more than rcode.
func refuse(buf []byte, q *query, rcode int) []byte {
	return newReply(buf, q, rcode, false, maxTCP).finish(rcode)
}
