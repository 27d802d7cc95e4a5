package node

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"timonel/agent/podnet"
	"timonel/internal/podrange"
	"timonel/network/address"
	"timonel/network/dns"
	"timonel/network/feed"
	"timonel/network/hostport"
	"timonel/network/netlab"
	"timonel/network/policy"
	"timonel/network/service"
	"timonel/network/tables"
)

// Where a process of this program finds what it is to be: the network part of an agent.
const envSeed, envSteps, envDir = "TIMONEL_TEST_SEED", "TIMONEL_TEST_STEPS", "TIMONEL_TEST_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(envDir); dir != "" {
		seed, _ := strconv.ParseUint(os.Getenv(envSeed), 10, 64)
		steps, _ := strconv.Atoi(os.Getenv(envSteps))
		if err := runAgent(seed, steps, dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Names of what an agent makes.
const (
	servicesTable, policyTable, podsTable = "timonel-services", "timonel-policy", "timonel-pods"
	hostPortsTable                        = "timonel-hostports"
	bridge                                = "br0"
	look                                  = 250 * time.Millisecond
)

var networks = podrange.Ranges{Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00::/29")}, Bits6: 64}

// macOf is that of a pod of this node.
func macOf(s slot) net.HardwareAddr {
	return net.HardwareAddr{2, 0, 0, 0, byte(s.node), byte(s.n)}
}

// runAgent is the network part of an agent that knows the world of a seed after so many steps,
// and of one more with each line that it reads. It is ended by a signal.
func runAgent(seed uint64, steps int, dir string) error {
	ctx := context.Background()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	w, store, watcher := newWorld(seed), feed.NewStore("n1"), &tables.Watcher{}
	store.Update(func(t *feed.Txn) {
		w.tell(t)
		for range steps {
			w.step(t)
		}
		t.SetSynced()
	})
	nodeIPs := []netip.Addr{netip.MustParseAddr(netlab.NodeIP), netip.MustParseAddr(netlab.NodeIP6)}
	services, err := service.New(service.Config{Node: "n1", NodeIPs: nodeIPs, Table: servicesTable, Store: store, Watcher: watcher, Look: look, Logger: log})
	if err != nil {
		return err
	}
	rules, err := policy.New(policy.Config{Table: policyTable, Bridge: bridge, Store: store, Watcher: watcher, Look: look, Logger: log})
	if err != nil {
		return err
	}
	hostPorts, err := hostport.New(hostport.Config{Table: hostPortsTable, Bridge: bridge, Watcher: watcher, Look: look, Logger: log})
	if err != nil {
		return err
	}
	announcer, err := address.New(address.Config{Node: "n1", NodeIPs: nodeIPs, Skip: []string{bridge}, Store: store, Logger: log})
	if err != nil {
		return err
	}
	pods, err := podnet.New(podnet.Config{
		Name: "n1", Bridge: bridge, ConfDir: filepath.Join(dir, "conf"), StateDir: filepath.Join(dir, "state"), BinDir: "/usr/lib/cni", Table: podsTable,
		NodeIPs: nodeIPs, Watcher: watcher, Logger: log,
	})
	if err != nil {
		return err
	}
	names := dns.NewAddresses(filepath.Join(dir, "dns.json"))
	had := map[string]bool{}
	tell := func() {
		is := map[string]bool{}
		for s, p := range w.pods {
			if s.node == 1 {
				is[string(p.UID)] = true
				rules.SetPod(policy.Pod{
					UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, Addresses: s.addresses(), Ports: p.Spec.Containers[0].Ports, Device: fmt.Sprint("v-pod", s.n), MAC: macOf(s),
				})
				hostPorts.SetPod(hostport.Pod{UID: string(p.UID), Addresses: s.addresses(), Ports: p.Spec.Containers[0].Ports})
			}
		}
		for uid := range had {
			if !is[uid] {
				rules.RemovePod(uid)
				hostPorts.RemovePod(uid)
			}
		}
		had = is
		services.SetNetworks(service.Networks{Pods: networks.Networks, Own: prefixes("10.244.1.0/24", "fd00:1::/64"), Services: prefixes("10.96.0.0/16", "fd96::/112"), Local: w.names})
		hostPorts.SetNetworks(hostport.Networks{Own: prefixes("10.244.1.0/24", "fd00:1::/64"), Services: prefixes("10.96.0.0/16", "fd96::/112")})
		if err := names.Set(w.names); err != nil {
			log.Error("names", "error", err)
		}
		if _, err := pods.Update([]string{"10.244.1.0/24", "fd00:1::/64"}, w.others(), podnet.Guard{Pods: networks, Services: prefixes("10.96.0.0/16", "fd96::/112")}); err != nil {
			log.Info("pod network", "error", err) // of ranges that overlap
		}
	}
	tell()
	for _, run := range []func(context.Context) error{services.Run, rules.Run, hostPorts.Run, announcer.Run} {
		go func() { _ = run(ctx) }()
	}
	lines := make(chan struct{})
	go func() {
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			lines <- struct{}{}
		}
		os.Exit(0) // the test has ended
	}()
	for tick := time.NewTicker(look); ; {
		select {
		case <-lines:
			store.Update(w.step)
			tell()
		case <-tick.C:
			_ = pods.Look() // is tried again
			_ = names.Set(w.names)
		}
	}
}

func prefixes(list ...string) (out []netip.Prefix) {
	for _, text := range list {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}
