package service

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/network/feed"
)

// health answers balancers that ask whether this node has endpoints of a Service whose
// external policy is Local, as kube-proxy does, on the Service's healthCheckNodePort.
type health struct {
	p       *Proxy
	servers map[healthKey]*healthServer
	at      []netip.Addr // where all listen; nil: everywhere
	serving sync.WaitGroup
}

type healthKey struct {
	name   feed.Name
	family corev1.IPFamily
}

type healthServer struct {
	name      feed.Name
	port      int32
	endpoints atomic.Int64 // ready, of this node
	healthy   func() bool
	servers   []*http.Server
}

func newHealth(p *Proxy) *health {
	return &health{p: p, servers: map[healthKey]*healthServer{}}
}

// update makes the servers what a View says. What could not listen is tried again with
// the next look.
func (h *health) update(changes feed.Changes, p *Proxy) {
	var at []netip.Addr
	if !p.around.allNodePorts {
		at = p.around.nodePorts
	}
	if changes.Reset {
		if !slices.Equal(at, h.at) {
			for _, s := range h.servers {
				s.close()
			}
		}
		h.at = at
		for key := range h.servers {
			h.one(changes.View, key.name)
		}
		for name, s := range changes.View.Services() {
			if needsHealthCheck(s) != 0 {
				h.one(changes.View, name)
			}
		}
		return
	}
	for name := range changes.Services {
		h.one(changes.View, name)
	}
	for key, s := range h.servers {
		if len(s.servers) == 0 {
			h.one(changes.View, key.name)
		}
	}
}

func (h *health) one(view *feed.View, name feed.Name) {
	svc := view.Service(name)
	for _, side := range h.p.sides {
		c := &side.compiler
		key := healthKey{name, c.family.ip}
		port := needsHealthCheck(svc)
		if _, ok := c.addressesOf(svc); !ok {
			port = 0
		}
		s := h.servers[key]
		if s != nil && s.port != port {
			s.close()
			delete(h.servers, key)
			s = nil
		}
		if port == 0 {
			continue
		}
		if s == nil {
			s = &healthServer{name: name, port: port, healthy: h.p.healthy}
			h.servers[key] = s
		}
		ips := map[netip.Addr]struct{}{}
		of := view.Slices(name)
		for i := range svc.Spec.Ports {
			for _, e := range c.endpointsOf(of, &svc.Spec.Ports[i]) {
				if e.local && e.ready {
					ips[e.ip] = struct{}{}
				}
			}
		}
		s.endpoints.Store(int64(len(ips)))
		if len(s.servers) == 0 {
			h.listen(c.family, s, svc)
		}
	}
}

func (h *health) listen(f family, s *healthServer, svc *corev1.Service) {
	network, hosts := "tcp4", []string{"0.0.0.0"}
	if !f.v4() {
		network, hosts = "tcp6", []string{"::"}
	}
	if h.at != nil {
		hosts = nil
		for _, ip := range h.at {
			if f.has(ip) {
				hosts = append(hosts, ip.String())
			}
		}
	}
	for _, host := range hosts {
		var config net.ListenConfig
		l, err := config.Listen(context.Background(), network, net.JoinHostPort(host, strconv.Itoa(int(s.port))))
		if err != nil {
			s.close()
			text := fmt.Sprintf("node %s failed to start healthcheck %q on port %d: %v", h.p.cfg.Node, s.name, s.port, err)
			side := h.p.sideOf(f)
			if side.said[s.name] != text {
				side.said[s.name] = text
				h.p.log.Warn("health check of a Service; free the port, or give the Service another spec.healthCheckNodePort", "service", s.name, "error", text)
				if h.p.cfg.Event != nil {
					h.p.cfg.Event(svc, ReasonHealth, text)
				}
			}
			return
		}
		server := &http.Server{Handler: s, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 30 * time.Second, MaxHeaderBytes: 8 << 10}
		s.servers = append(s.servers, server)
		h.serving.Go(func() { _ = server.Serve(l) }) // it ends when it is closed
	}
}

// ServeHTTP says what kube-proxy says, to the letter.
func (s *healthServer) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	n, healthy := s.endpoints.Load(), s.healthy()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.FormatInt(n, 10))
	if n != 0 && healthy {
		w.WriteHeader(http.StatusOK)
	} else {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	fmt.Fprintf(w, "{\n\t\"service\": {\n\t\t\"namespace\": %q,\n\t\t\"name\": %q\n\t},\n\t\"localEndpoints\": %d,\n\t\"serviceProxyHealthy\": %v\n}",
		s.name.Namespace, s.name.Name, n, healthy)
}

func (s *healthServer) close() {
	for _, server := range s.servers {
		_ = server.Close() // it has no connections that matter
	}
	s.servers = nil
}

func (h *health) close() {
	for _, s := range h.servers {
		s.close()
	}
	h.serving.Wait()
}
