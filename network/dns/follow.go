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

// followResolvConf asks the servers that the node's resolv.conf names.
func (s *Server) followResolvConf(ctx context.Context) {
	if s.cfg.ResolvConf == "" {
		s.forward.set(nil)
		return
	}
	var known []string
	said := ""
	for first := true; ; first = false {
		c, err := resolvconf.Read(s.cfg.ResolvConf)
		switch {
		case err != nil:
			if text := err.Error(); text != said {
				said = text
				s.log.Error("read the node's name servers: those known are asked", "error", err)
			}
		case first || !slices.Equal(c.Servers, known):
			known, said = c.Servers, ""
			s.forward.set(addrPorts(known))
			s.log.Info("names outside the cluster are asked for at", "servers", known)
			s.forward.findLoops(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(lookEvery):
		}
	}
}
