package gossip

import (
	"encoding/json"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/hashicorp/memberlist"
)

// State says what is known of a member.
type State int

// The states of a member.
const (
	Unknown State = iota // not in the pool
	Alive
	Suspect // it does not answer this member's pings
	Dead    // the pool agrees that it is gone
	Left    // it said goodbye
)

func (s State) String() string {
	switch s {
	case Alive:
		return "alive"
	case Suspect:
		return "suspect"
	case Dead:
		return "dead"
	case Left:
		return "left"
	}
	return "unknown"
}

// Member is one member of the pool as this member sees it.
type Member struct {
	Name  string
	Addr  string // host:port of its gossip
	Role  string
	Tags  map[string]string // shared: not to be changed
	State State
	Since time.Time // when it came into that state
}

// Host is the member's IP address.
func (m Member) Host() string {
	host, _, err := net.SplitHostPort(m.Addr)
	if err != nil {
		return m.Addr
	}
	return host
}

// meta is what travels with each member.
type meta struct {
	Role    string            `json:"r"`
	Cluster string            `json:"c"`
	Left    bool              `json:"l,omitempty"` // it is leaving: memberlist does not tell this from dying
	Tags    map[string]string `json:"t,omitempty"`
}

// leftRoom is kept for the field Left of a member that has its tags full.
const leftRoom = len(`"l":true,`)

func (m meta) encode() ([]byte, error) {
	data, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("gossip config: Tags: %w", err)
	}
	if limit := memberlist.MetaMaxSize - leftRoom; !m.Left && len(data) > limit {
		return nil, fmt.Errorf("gossip config: Tags, Role and ClusterID take %d bytes, %d fit", len(data), limit)
	}
	return data, nil
}

func decodeMeta(data []byte) (meta, error) {
	var m meta
	if len(data) > memberlist.MetaMaxSize {
		return meta{}, fmt.Errorf("its tags have %d bytes, %d are the most", len(data), memberlist.MetaMaxSize)
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return meta{}, fmt.Errorf("its tags cannot be read: %w", err)
	}
	return m, nil
}

func address(n *memberlist.Node) string {
	return net.JoinHostPort(n.Addr.String(), strconv.Itoa(int(n.Port)))
}
