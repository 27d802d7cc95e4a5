package service

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"timonel/network/feed"
	"timonel/network/netlab"
)

// get asks for a health check as a balancer does: "STATUS WEIGHT", and what was said.
func get(t *testing.T, h *netlab.Host, url string) (head, body string) {
	h.Do(func() {
		// A request's connection is made by another goroutine, which is nowhere special.
		conn, err := net.Dial("tcp", url)
		if err != nil {
			head = netlab.Failure(err)
			return
		}
		defer conn.Close()
		client := http.Client{Timeout: netlab.Patience, Transport: &http.Transport{Dial: func(string, string) (net.Conn, error) { return conn, nil }}}
		resp, err := client.Get("http://" + url + "/healthz")
		require.NoError(t, err)
		defer resp.Body.Close()
		raw, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		head = fmt.Sprintf("%d %s %s", resp.StatusCode, resp.Header.Get("X-Load-Balancing-Endpoint-Weight"), resp.Header.Get("Content-Type"))
		body = string(raw)
	})
	return head, body
}

func TestHealthChecks(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		l.quiet = true
		var events []string
		l.start(Config{Event: func(s *corev1.Service, reason, message string) {
			events = append(events, s.Name+" "+reason+": "+message)
		}})
		defer func() { l.proxy.health.close() }()
		out := l.Outside()
		check := func(port int32) option {
			return func(s *corev1.Service) { s.Spec.HealthCheckNodePort = port }
		}
		const at, at6 = nodeIP + ":32000", "[" + nodeIP6 + "]:32000"
		s := svc("web", "10.96.0.10", dual("fd96::10"), balancer("203.0.113.7"), externalLocal, check(32000))
		l.set(s, slice("web", ep("10.244.1.2"), ep("10.244.1.3"), ep("10.244.1.4", terminating), ep("10.244.2.2")), slice("web", ep("fd00:1::2")))
		head, body := get(t, out, at)
		require.Equal(t, "200 2 application/json", head)
		require.Equal(t, "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}", body)
		head, _ = get(t, out, at6)
		require.Equal(t, "200 1 application/json", head)
		l.set(s, slice("web", ep("10.244.1.4", terminating), ep("10.244.2.2")))
		head, body = get(t, out, at)
		require.Equal(t, "503 0 application/json", head)
		require.Contains(t, body, `"localEndpoints": 0`)

		// Another port, one that is taken, and none.
		l.set(svc("web", "10.96.0.10", dual("fd96::10"), balancer("203.0.113.7"), externalLocal, check(32001)))
		head, _ = get(t, out, at)
		require.Equal(t, "refused", head)
		head, _ = get(t, out, nodeIP+":32001")
		require.Equal(t, "503 0 application/json", head)
		foreign, err := net.Listen("tcp", nodeIP+":32002")
		require.NoError(t, err)
		l.set(svc("web", "10.96.0.10", balancer("203.0.113.7"), externalLocal, check(32002)))
		require.Len(t, events, 1)
		require.Contains(t, events[0], `web FailedToStartServiceHealthcheck: node n1 failed to start healthcheck "default/web" on port 32002`)
		l.pass()
		require.Len(t, events, 1, "said once")
		foreign.Close()
		// A process that another test is about to start may still have the socket: it is tried again.
		for end := time.Now().Add(netlab.Patience); ; time.Sleep(10 * time.Millisecond) {
			l.pass()
			if head, _ = get(t, out, nodeIP+":32002"); head != "refused" || time.Now().After(end) {
				break
			}
		}
		require.Equal(t, "503 0 application/json", head)
		l.set(svc("web", "10.96.0.10", balancer("203.0.113.7"), check(32002)))
		head, _ = get(t, out, nodeIP+":32002")
		require.Equal(t, "refused", head)
		l.store.Update(func(t *feed.Txn) { t.RemoveService(feed.Name{Namespace: "default", Name: "web"}) })
		l.pass()
		require.Empty(t, l.proxy.health.servers)
	})
}
