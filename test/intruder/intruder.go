// Package intruder speaks memberlist's language with a stolen key, and says what no
// member would: of members that there are not, of others that they are dead, more than
// fits. Tests attack pools with it.
//
//	x, err := intruder.New(bundle.GossipKey(), bundle.ClusterID())
//	x.Packet("10.0.0.11:7946", x.Alive(intruder.Member{Name: "c1", Role: "controller", IP: …}))
package intruder

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Kinds of messages, memberlist's numbers.
const (
	Suspect   = 3
	Alive     = 4
	Dead      = 5
	PushPull  = 6
	Encrypted = 10
)

// MaxSealed is the most that sealing adds to a message.
const MaxSealed = 1 + nonceSize + 16

const nonceSize = 12

// versions are what memberlist and its user speak.
var versions = []byte{1, 5, 2, 0, 0, 0}

// Intruder has a key of a cluster's gossip.
type Intruder struct {
	seal    cipher.AEAD
	cluster string
	udp     net.PacketConn
}

// New has the key of the pool of a cluster.
func New(key []byte, cluster string) (*Intruder, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("intruder: %w", err)
	}
	x := &Intruder{cluster: cluster}
	if x.seal, err = cipher.NewGCM(block); err != nil {
		return nil, fmt.Errorf("intruder: %w", err)
	}
	if x.udp, err = net.ListenPacket("udp", ":0"); err != nil {
		return nil, fmt.Errorf("intruder: %w", err)
	}
	return x, nil
}

// Close stops to listen.
func (x *Intruder) Close() error { return x.udp.Close() }

// Seal is a message as a member seals it, with what comes before it in clear.
func (x *Intruder) Seal(message, with []byte) []byte {
	nonce := make([]byte, nonceSize)
	rand.Read(nonce)
	return x.seal.Seal(append([]byte{1}, nonce...), nonce, message, with)
}

// Packet sends a message.
func (x *Intruder) Packet(addr string, message []byte) error {
	to, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return fmt.Errorf("intruder: %w", err)
	}
	if _, err := x.udp.WriteTo(x.Seal(message, nil), to); err != nil {
		return fmt.Errorf("intruder: %w", err)
	}
	return nil
}

// Stream sends a message over a connection, and returns when the other has closed it,
// limit at most.
func (x *Intruder) Stream(addr string, message []byte, limit time.Duration) error {
	conn, err := net.DialTimeout("tcp", addr, limit)
	if err != nil {
		return fmt.Errorf("intruder: %w", err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(limit))
	head := binary.BigEndian.AppendUint32([]byte{Encrypted}, uint32(len(message)+MaxSealed))
	_, _ = conn.Write(append(bytes.Clone(head), x.Seal(message, head)...)) // it may close at once
	_, err = io.Copy(io.Discard, conn)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return fmt.Errorf("intruder: %s does not close the connection: %w", addr, err)
	}
	return nil
}

// Member is what is said of one.
type Member struct {
	Name, Role  string
	IP          net.IP
	Port        int
	Incarnation int
	Tags        map[string]string
}

func (x *Intruder) meta(m Member) []byte {
	data, err := json.Marshal(map[string]any{"r": m.Role, "c": x.cluster, "t": m.Tags})
	if err != nil {
		panic(err) // of strings alone
	}
	return data
}

// Alive says that a member lives.
func (x *Intruder) Alive(m Member) []byte {
	return append([]byte{Alive}, Record("Incarnation", m.Incarnation, "Node", m.Name, "Addr", []byte(m.IP.To4()), "Port", m.Port,
		"Meta", x.meta(m), "Vsn", versions)...)
}

// Gone says that a member is dead, or suspect to be so.
func (x *Intruder) Gone(kind byte, name, from string, incarnation int) []byte {
	return append([]byte{kind}, Record("Incarnation", incarnation, "Node", name, "From", from)...)
}

// State is all that one knows: of these.
func (x *Intruder) State(members ...Member) []byte {
	out := append([]byte{PushPull}, Record("Nodes", len(members), "UserStateLen", 0, "Join", false)...)
	for _, m := range members {
		out = append(out, Record("Name", m.Name, "Addr", []byte(m.IP.To4()), "Port", m.Port, "Meta", x.meta(m),
			"Incarnation", m.Incarnation, "State", 0, "Vsn", versions)...)
	}
	return out
}

// Record is names and values in msgpack.
func Record(fields ...any) []byte {
	out := binary.BigEndian.AppendUint16([]byte{0xde}, uint16(len(fields)/2))
	raw := func(b []byte) {
		out = append(binary.BigEndian.AppendUint16(append(out, 0xda), uint16(len(b))), b...)
	}
	for _, f := range fields {
		switch f := f.(type) {
		case string:
			raw([]byte(f))
		case []byte:
			raw(f)
		case int:
			out = binary.BigEndian.AppendUint64(append(out, 0xcf), uint64(f))
		case bool:
			if f {
				out = append(out, 0xc3)
			} else {
				out = append(out, 0xc2)
			}
		}
	}
	return out
}
