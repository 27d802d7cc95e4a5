package dns

import (
	"encoding/binary"

	"github.com/miekg/dns"
)

const (
	headerSize = 12
	optSize    = 11 // of an OPT record without options
	maxName    = 255

	flagQR = 1 << 15
	flagAA = 1 << 10
	flagTC = 1 << 9
	flagRD = 1 << 8
	flagRA = 1 << 7
	flagAD = 1 << 5
	flagCD = 1 << 4
)

// query is what a client asks. It refers to the message that it was read from.
type query struct {
	id     uint16
	opcode uint16
	rd     bool
	ad, cd bool
	// question is the name as it came, its letters as the client wrote them, with
	// type and class behind. Its first byte is at headerSize in each answer.
	question []byte
	// labels are the name's, in lower case; none for the root.
	labels []string
	kind   uint16
	class  uint16
	edns   bool
	do     bool
	size   int // what the client takes by UDP
}

// parse reads a query. With ok false there is nothing to answer; otherwise rcode says
// what is wrong with it, if anything is.
func parse(b []byte) (q query, rcode int, ok bool) {
	if len(b) < headerSize {
		return q, 0, false
	}
	flags := binary.BigEndian.Uint16(b[2:])
	if flags&flagQR != 0 {
		return q, 0, false // an answer: answering it could go on for ever
	}
	q = query{
		id: binary.BigEndian.Uint16(b), opcode: flags >> 11 & 0xf,
		rd: flags&flagRD != 0, ad: flags&flagAD != 0, cd: flags&flagCD != 0, size: dns.MinMsgSize,
	}
	if q.opcode != dns.OpcodeQuery {
		return q, dns.RcodeNotImplemented, true
	}
	if binary.BigEndian.Uint16(b[4:]) != 1 || binary.BigEndian.Uint32(b[6:]) != 0 {
		return q, dns.RcodeFormatError, true // one question, no records but additional ones
	}
	at := headerSize
	for {
		if at >= len(b) || b[at] > 63 || at-headerSize >= maxName {
			return q, dns.RcodeFormatError, true
		}
		n := int(b[at])
		if n == 0 {
			break
		}
		if at+1+n >= len(b) {
			return q, dns.RcodeFormatError, true
		}
		q.labels = append(q.labels, lower(b[at+1:at+1+n]))
		at += 1 + n
	}
	if at++; at-headerSize > maxName || at+4 > len(b) {
		return q, dns.RcodeFormatError, true
	}
	q.kind, q.class = binary.BigEndian.Uint16(b[at:]), binary.BigEndian.Uint16(b[at+2:])
	at += 4
	q.question = b[headerSize:at]
	for range binary.BigEndian.Uint16(b[10:]) {
		name := at
		if at = skipName(b, at); at < 0 || at+10 > len(b) {
			return q, dns.RcodeFormatError, true
		}
		kind, class, ttl, size := binary.BigEndian.Uint16(b[at:]), binary.BigEndian.Uint16(b[at+2:]), binary.BigEndian.Uint32(b[at+4:]), binary.BigEndian.Uint16(b[at+8:])
		if at += 10 + int(size); at > len(b) {
			return q, dns.RcodeFormatError, true
		}
		if kind != dns.TypeOPT {
			continue
		}
		if q.edns || b[name] != 0 {
			return q, dns.RcodeFormatError, true
		}
		q.edns, q.do = true, ttl&(1<<15) != 0
		q.size = min(max(int(class), dns.MinMsgSize), maxUDP)
		if ttl>>16&0xff != 0 {
			return q, dns.RcodeBadVers, true
		}
	}
	return q, dns.RcodeSuccess, true
}

// skipName returns where a name ends, -1 when it does not.
func skipName(b []byte, at int) int {
	for at < len(b) {
		switch n := int(b[at]); {
		case n == 0:
			return at + 1
		case n >= 0xc0:
			if at+2 > len(b) {
				return -1
			}
			return at + 2
		case n > 63:
			return -1
		default:
			at += 1 + n
		}
	}
	return -1
}

// lower is a label in lower case, as all comparisons are.
func lower(label []byte) string {
	for i, c := range label {
		if 'A' <= c && c <= 'Z' {
			out := append([]byte(nil), label...)
			for j := i; j < len(out); j++ {
				if c := out[j]; 'A' <= c && c <= 'Z' {
					out[j] = c + 'a' - 'A'
				}
			}
			return string(out)
		}
	}
	return string(label)
}
