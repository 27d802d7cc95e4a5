package address

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/mdlayher/ndp"
	"golang.org/x/sys/unix"
)

// mac is an Ethernet address.
type mac [6]byte

func (m mac) String() string { return net.HardwareAddr(m[:]).String() }

var broadcast = mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// verb is what a frame says of an address.
type verb int

const (
	// asks wants to know who has the address, to send to it.
	asks verb = iota
	// probes wants to know who has the address, to have it. Nobody learns anything by it.
	probes
	// claims says that the sender has the address.
	claims
)

// message is what a frame says of one address.
type message struct {
	verb verb
	ip   netip.Addr
	from mac
	// asker is the address of who asks.
	asker netip.Addr
	// number is that of the holder, 0 where no Timonel speaks.
	number uint64
}

const (
	headerBytes = 14
	arpBytes    = 28
	ipv6Bytes   = 40
	// optionNumber is an NDP option for experiments (RFC 4727).
	optionNumber = 253
	icmpv6       = 58
)

// magic is before a number.
var magic = []byte("TMNL")

// sealed is a number as it travels, in so many bytes.
func sealed(number uint64, size int) []byte {
	out := make([]byte, size)
	binary.BigEndian.PutUint64(out[copy(out, magic):], number)
	return out
}

func unsealed(raw []byte) uint64 {
	if rest, ok := bytes.CutPrefix(raw, magic); ok && len(rest) >= 8 {
		return binary.BigEndian.Uint64(rest)
	}
	return 0
}

// parse returns what a frame says, nothing if it is not understood.
func parse(frame []byte) []message {
	if len(frame) < headerBytes {
		return nil
	}
	body := frame[headerBytes:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_ARP:
		return parseARP(body)
	case unix.ETH_P_IPV6:
		return parseNDP(mac(frame[6:12]), body)
	}
	return nil
}

// arpHead is Ethernet, IPv4 and their lengths.
var arpHead = []byte{0, 1, 8, 0, 6, 4}

const (
	arpRequest = 1
	arpReply   = 2
)

func parseARP(body []byte) (out []message) {
	if len(body) < arpBytes || !bytes.Equal(body[:6], arpHead) {
		return nil
	}
	op, from := binary.BigEndian.Uint16(body[6:]), mac(body[8:14])
	sender, target := netip.AddrFrom4([4]byte(body[14:18])), netip.AddrFrom4([4]byte(body[24:28]))
	number := unsealed(body[arpBytes:])
	if op != arpRequest && op != arpReply {
		return nil
	}
	if !sender.IsUnspecified() {
		out = append(out, message{verb: claims, ip: sender, from: from, number: number})
	}
	switch {
	case op == arpReply || sender == target:
	case sender.IsUnspecified():
		out = append(out, message{verb: probes, ip: target, from: from, number: number})
	default:
		out = append(out, message{verb: asks, ip: target, from: from, asker: sender})
	}
	return out
}

func parseNDP(from mac, body []byte) []message {
	if len(body) < ipv6Bytes || body[0]>>4 != 6 || body[6] != icmpv6 || body[7] != 255 {
		return nil // what came by a router is no neighbour's
	}
	size := int(binary.BigEndian.Uint16(body[4:]))
	source := netip.AddrFrom16([16]byte(body[8:24]))
	if body = body[ipv6Bytes:]; len(body) < size {
		return nil
	}
	m, err := ndp.ParseMessage(body[:size])
	if err != nil {
		return nil
	}
	switch m := m.(type) {
	case *ndp.NeighborSolicitation:
		if source.IsUnspecified() {
			return []message{{verb: probes, ip: m.TargetAddress, from: from, number: numberOf(m.Options)}}
		}
		return []message{{verb: asks, ip: m.TargetAddress, from: from, asker: source}}
	case *ndp.NeighborAdvertisement:
		return []message{{verb: claims, ip: m.TargetAddress, from: from, number: numberOf(m.Options)}}
	}
	return nil
}

func numberOf(options []ndp.Option) uint64 {
	for _, o := range options {
		if raw, ok := o.(*ndp.RawOption); ok && raw.Type == optionNumber {
			return unsealed(raw.Value)
		}
	}
	return 0
}

// render makes the frames that say a message of this machine: for whom it is, of a question
// who asked it; else everybody.
func render(m message, to mac) [][]byte {
	if m.ip.Is4() {
		return renderARP(m, to)
	}
	return renderNDP(m, to)
}

func renderARP(m message, to mac) [][]byte {
	one := func(op uint16, dst mac, sender netip.Addr, targetMAC mac, target netip.Addr) []byte {
		out := header(dst, m.from, unix.ETH_P_ARP)
		out = append(out, arpHead...)
		out = binary.BigEndian.AppendUint16(out, op)
		out = append(append(out, m.from[:]...), sender.AsSlice()...)
		out = append(append(out, targetMAC[:]...), target.AsSlice()...)
		return append(out, sealed(m.number, 18)...)
	}
	switch {
	case m.verb == probes:
		return [][]byte{one(arpRequest, broadcast, netip.IPv4Unspecified(), mac{}, m.ip)}
	case m.asker.IsValid():
		return [][]byte{one(arpReply, to, m.ip, to, m.asker)}
	}
	// Some machines listen to the one and some to the other.
	return [][]byte{one(arpRequest, broadcast, m.ip, mac{}, m.ip), one(arpReply, broadcast, m.ip, broadcast, m.ip)}
}

var allNodes = netip.MustParseAddr("ff02::1")

func renderNDP(m message, to mac) [][]byte {
	options := []ndp.Option{&ndp.RawOption{Type: optionNumber, Length: 2, Value: sealed(m.number, 14)}}
	var body ndp.Message
	source, target := m.ip, allNodes
	switch {
	case m.verb == probes:
		group, err := ndp.SolicitedNodeMulticast(m.ip)
		if err != nil {
			return nil
		}
		source, target = netip.IPv6Unspecified(), group
		body = &ndp.NeighborSolicitation{TargetAddress: m.ip, Options: options}
	default:
		own := &ndp.LinkLayerAddress{Direction: ndp.Target, Addr: m.from[:]}
		answer := m.asker.IsValid()
		if answer {
			target = m.asker
		}
		body = &ndp.NeighborAdvertisement{Solicited: answer, Override: true, TargetAddress: m.ip, Options: append([]ndp.Option{own}, options...)}
	}
	raw, err := ndp.MarshalMessageChecksum(body, source, target)
	if err != nil {
		return nil
	}
	dst := to
	if target.IsMulticast() {
		end := target.As16()
		dst = mac{0x33, 0x33, end[12], end[13], end[14], end[15]}
	}
	out := header(dst, m.from, unix.ETH_P_IPV6)
	out = append(out, 0x60, 0, 0, 0)
	out = binary.BigEndian.AppendUint16(out, uint16(len(raw)))
	out = append(out, icmpv6, 255)
	out = append(append(out, source.AsSlice()...), target.AsSlice()...)
	return [][]byte{append(out, raw...)}
}

func header(dst, src mac, kind uint16) []byte {
	out := append(append(make([]byte, 0, 128), dst[:]...), src[:]...)
	return binary.BigEndian.AppendUint16(out, kind)
}
