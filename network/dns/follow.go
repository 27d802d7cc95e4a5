package dns

import (
	"context"
	"slices"
	"time"

	"timonel/network/dns/resolvconf"
)

// lookEvery is how often the node's resolv.conf is read. It is replaced by files and
// links of other names, which nothing tells of.
const lookEvery = 2 * time.Second

// nameServers are those that the node's resolv.conf names.
type nameServers struct {
	known []string
	read  bool   // once
	said  string // the error told last
}

// readResolvConf asks the servers that the node's resolv.conf names now, and says
// whether they are others than before.
func (s *Server) readResolvConf(n *nameServers) (changed bool) {
	if s.cfg.ResolvConf == "" {
		s.forward.set(nil)
		return false
	}
	c, err := resolvconf.Read(s.cfg.ResolvConf)
	if err != nil {
		if text := err.Error(); text != n.said {
			n.said = text
			s.log.Error("read the node's name servers: those known are asked", "error", err)
		}
		return false
	}
	if n.read && slices.Equal(c.Servers, n.known) {
		return false
	}
	n.known, n.read, n.said = c.Servers, true, ""
	s.forward.set(addrPorts(c.Servers))
	s.log.Info("names outside the cluster are asked for at", "servers", c.Servers)
	return true
}

// followResolvConf goes on to read the node's resolv.conf, and finds out which of the
// servers ask us.
func (s *Server) followResolvConf(ctx context.Context, n *nameServers, changed bool) {
	for s.cfg.ResolvConf != "" {
		if changed {
			s.forward.findLoops(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(lookEvery):
		}
		changed = s.readResolvConf(n)
	}
}
