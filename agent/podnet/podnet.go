package podnet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"

	"timonel/agent/hostile"
	"timonel/internal/durable"
	"timonel/network/tables"
)

// Config says where the network's files are and what it is called.
type Config struct {
	// Name is the CNI network's name, derived from the node's.
	Name string
	// Bridge is the network device that pods hang on.
	Bridge string
	// ConfDir is where containerd reads CNI configuration; StateDir keeps the
	// addresses that are given out.
	ConfDir, StateDir string
	// Foreign says that ConfDir is somebody else's: another pod network, that gives pods
	// their addresses and carries their packets. Nothing of it is made here.
	Foreign bool
	// BinDir has the plugins bridge, host-local and loopback.
	BinDir string
	// Table is the nftables table for address translation.
	Table string
	// NodeIPs are this node's own addresses. The family of the first is that of what
	// carries packets to other nodes.
	NodeIPs []netip.Addr
	// Mode says how other nodes' pods are reached. Default Auto.
	Mode Mode
	// VXLAN says where packets are that are carried to nodes of other segments.
	VXLAN VXLAN
	// MTU is that of pods. Default: that of the device with this node's address, less
	// what VXLAN takes where that is needed.
	MTU int
	// KeepSource are networks beside the pods' to which pods' packets go with the pod's
	// own address.
	KeepSource []netip.Prefix
	// Watcher is that of all who write to nftables here. Default: one of its own.
	Watcher *tables.Watcher
	// Event is called with what an administrator should know; may be nil.
	Event func(reason, message string)
	// Keep are addresses that no route may lead away from, known before a controller
	// has said anything: the controllers'.
	Keep   []netip.Addr
	Logger *slog.Logger
}

// Mode is how the pods of other nodes are reached.
type Mode string

// Modes of the pod network.
const (
	// Auto is by routes to nodes of the same segment and by VXLAN to others.
	Auto Mode = "auto"
	// Direct is by routes alone: nodes of other segments are not reached.
	Direct Mode = "direct"
	// Tunnel is by VXLAN alone, as where a segment drops packets of pods' addresses.
	Tunnel Mode = "vxlan"
)

// CheckMode says whether a text is a mode.
func CheckMode(text string) error {
	if !slices.Contains([]Mode{Auto, Direct, Tunnel}, Mode(text)) {
		return fmt.Errorf("%q is not %s, %s or %s", text, Auto, Direct, Tunnel)
	}
	return nil
}

// Peer is another node: its pods' ranges and its addresses, one of a family at most.
type Peer struct {
	Name      string
	CIDRs     []string
	Addresses []string
}

// Network is one node's pod network.
type Network struct {
	cfg Config
	log *slog.Logger

	updating sync.Mutex // one Update at a time; guards what follows
	refused  string     // what was last refused, as it was logged
	told     map[string]string
	peers    []Peer
	updated  bool
	rules    rules // as they were written last
	ruled    bool  // the table is as rules say, if nobody else changed it
	trust    tables.Trust
	lines    map[string]int // rules of each chain

	mu    sync.Mutex
	cidrs []string
	guard Guard
}

// New returns a network that has what an earlier agent left. It checks that
// the plugins are there.
func New(cfg Config) (*Network, error) {
	for _, plugin := range []string{"bridge", "host-local", "loopback"} {
		if cfg.Foreign {
			break // it brings its own
		}
		if _, err := os.Stat(filepath.Join(cfg.BinDir, plugin)); err != nil {
			return nil, fmt.Errorf("CNI plugin %s not found in %s: install it with: apt-get install containernetworking-plugins (or set --cni-bin)", plugin, cfg.BinDir)
		}
	}
	cfg.VXLAN = cfg.VXLAN.withDefaults()
	if cfg.Watcher == nil {
		cfg.Watcher = &tables.Watcher{}
	}
	n := &Network{cfg: cfg, log: cfg.Logger.With("component", "podnet"), told: map[string]string{}}
	if raw, err := hostile.ReadRegular(n.statePath(), hostile.MaxOwn); err == nil {
		_ = json.Unmarshal(raw, &n.cidrs) // a damaged file is as none: it comes anew
	}
	n.guard = n.loadGuard()
	if cfg.Foreign { // of a time when it was not
		return n, errors.Join(forwarding(), n.routes(nil), n.removeTunnel(), n.removeRules())
	}
	if err := n.sweep(); err != nil {
		n.log.Error("look for routes that must not be", "error", err)
	}
	if _, err := os.Stat(n.confPath()); len(n.cidrs) > 0 && err != nil {
		mtu, _ := n.underlay()
		return n, n.apply(n.cidrs, mtu)
	}
	return n, forwarding()
}

func (n *Network) statePath() string { return filepath.Join(n.cfg.StateDir, "pod-cidrs.json") }
func (n *Network) confPath() string  { return filepath.Join(n.cfg.ConfDir, "10-timonel.conflist") }

// Ready says whether this node has a pod CIDR, if it needs one.
func (n *Network) Ready() bool {
	if n.cfg.Foreign {
		return true
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.cidrs) > 0
}

// CIDRs are the node's own.
func (n *Network) CIDRs() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cidrs
}

// Guard is the last that a controller told, also before a restart; the zero Guard: none
// ever did.
func (n *Network) Guard() Guard {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.guard
}

// Update takes the node's own pod CIDRs and those of its peers, as a controller says
// that they are. What guard does not let pass is left out and is in the error; the
// rest is done all the same. changed says that the node's own are new.
func (n *Network) Update(own []string, peers []Peer, guard Guard) (changed bool, err error) {
	n.updating.Lock()
	defer n.updating.Unlock()
	addresses, err := n.ownAddresses()
	if err != nil {
		return false, err
	}
	if n.cfg.Foreign {
		addresses = nil // some are of its devices, and of the ranges
	}
	n.mu.Lock()
	old, known := n.cidrs, n.guard
	n.mu.Unlock()
	if !known.equal(guard) {
		if err := os.MkdirAll(n.cfg.StateDir, 0o700); err != nil {
			return false, fmt.Errorf("make the pod network's folder: %w", err)
		}
		if err := n.keepGuard(guard); err != nil {
			return false, err
		}
	}
	var ranges []netip.Prefix
	var refused error
	for _, text := range own {
		p, err := guard.checkRange(text, addresses)
		if err != nil {
			refused = fmt.Errorf("this node's own pod range: %w", err)
			own, ranges = nil, nil
			break
		}
		ranges = append(ranges, p)
	}
	if len(own) > 0 && fmt.Sprint(own) != fmt.Sprint(old) {
		if len(old) > 0 {
			n.log.Warn("this node's pod CIDR has changed; running pods keep their old addresses", "old", old, "new", own)
			n.event("PodRangeChanged", fmt.Sprintf("The pod range of this node was %s and is %s: pods that run keep addresses that nobody has a route to any more. Delete them, so that they are made anew",
				strings.Join(old, ", "), strings.Join(own, ", ")))
		}
		mtu, _ := n.underlay()
		if err := n.apply(own, mtu); err != nil {
			return false, err
		}
		raw, err := json.Marshal(own)
		if err == nil {
			err = os.WriteFile(n.statePath(), raw, 0o600)
		}
		if err != nil {
			return false, fmt.Errorf("keep the pod CIDR: %w", err)
		}
		changed = true
	}
	n.mu.Lock()
	if len(own) > 0 {
		n.cidrs = own
	}
	n.guard = guard
	n.mu.Unlock()
	for _, text := range old { // a range that was refused leaves the old one in place
		if p, err := netip.ParsePrefix(text); err == nil && len(own) == 0 {
			ranges = append(ranges, p.Masked())
		}
	}
	n.peers, n.updated = peers, true
	if n.cfg.Foreign {
		return changed, refused
	}
	return changed, errors.Join(refused, n.connect(ranges, guard, addresses, refused))
}

// Look looks again at how other nodes are reached, and makes anew what somebody took
// away or a device lost that went down.
func (n *Network) Look() error {
	n.updating.Lock()
	defer n.updating.Unlock()
	if !n.updated || n.cfg.Foreign {
		return nil
	}
	addresses, err := n.ownAddresses()
	if err != nil {
		return err
	}
	var ranges []netip.Prefix
	for _, text := range n.CIDRs() {
		if p, err := netip.ParsePrefix(text); err == nil {
			ranges = append(ranges, p.Masked())
		}
	}
	return n.connect(ranges, n.Guard(), addresses, nil)
}

// connect makes everything as it should be for the node's ranges and its peers. What
// cannot be is in the error, and the rest is made all the same.
func (n *Network) connect(ranges []netip.Prefix, guard Guard, addresses []netip.Addr, refused error) error {
	hops, wrong := guard.sift(ranges, n.peers, addresses)
	n.say(errors.Join(refused, wrong))
	paths, far := n.paths(hops)
	n.tell("PodsOfNodeNotReached", far)
	errs := []error{wrong}
	mtu, linkErr := n.underlay()
	tunnelled := slices.ContainsFunc(paths, func(p path) bool { return p.end.IsValid() })
	outer := 0
	if linkErr != nil {
		errs = append(errs, linkErr)
	} else if mtu > 0 {
		outer = mtu - n.overhead()
	}
	if tunnelled && outer > 0 {
		mtu = outer
	}
	if n.cfg.MTU > 0 {
		mtu = n.cfg.MTU
	}
	if cidrs := n.CIDRs(); len(cidrs) > 0 {
		errs = append(errs, n.apply(cidrs, mtu))
	}
	rulesErr := n.makeRules(ranges, guard, hops)
	errs = append(errs, rulesErr)
	switch {
	case !n.tunnels():
		errs = append(errs, n.removeTunnel())
	case rulesErr == nil && len(ranges) > 0: // what comes out of it is looked at from the first packet
		err := n.tunnel(ranges, paths, outer)
		n.tell("PodTunnelFailed", err)
		errs = append(errs, err)
	}
	paths = slices.DeleteFunc(paths, func(p path) bool { return p.link == 0 })
	errs = append(errs, n.routes(paths))
	if n.tunnels() {
		errs = append(errs, n.sweepTunnel(paths))
	}
	return errors.Join(errs...)
}

// event is Config.Event.
func (n *Network) event(reason, message string) {
	if n.cfg.Event != nil {
		n.cfg.Event(reason, message)
	}
}

// tell logs an error and makes an event of it, once for as long as it is the same.
func (n *Network) tell(reason string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != n.told[reason] && text != "" {
		n.log.Warn("pod network", "reason", reason, "error", err)
		n.event(reason, text)
	}
	n.told[reason] = text
}

// say logs what was refused, once for as long as it is the same.
func (n *Network) say(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != n.refused && text != "" {
		n.log.Error("the controller asks for routes that must not be; they are left out", "error", err)
		n.event("PodRangeRefused", "Left out: "+text)
	}
	n.refused = text
}

// apply writes the CNI configuration and turns forwarding on.
func (n *Network) apply(cidrs []string, mtu int) error {
	if err := forwarding(); err != nil {
		return err
	}
	if n.cfg.Foreign {
		return os.MkdirAll(n.cfg.StateDir, 0o700)
	}
	for _, dir := range []string{n.cfg.ConfDir, n.cfg.StateDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make the pod network's folder: %w", err)
		}
	}
	conf, err := n.render(cidrs, mtu)
	if err != nil {
		return err
	}
	if old, err := hostile.ReadRegular(n.confPath(), hostile.MaxOwn); err == nil && bytes.Equal(old, conf) {
		return nil
	}
	if err := durable.WriteFile(n.confPath(), conf, 0o600); err != nil {
		return fmt.Errorf("write the CNI configuration: %w", err)
	}
	return nil
}

func (n *Network) render(cidrs []string, mtu int) ([]byte, error) {
	type object = map[string]any
	var ranges [][]object
	var routes []object
	for _, c := range cidrs {
		p, err := netip.ParsePrefix(c)
		if err != nil {
			return nil, fmt.Errorf("pod CIDR %q: %w", c, err)
		}
		ranges = append(ranges, []object{{"subnet": p.Masked().String()}})
		dst := "0.0.0.0/0"
		if p.Addr().Is6() {
			dst = "::/0"
		}
		routes = append(routes, object{"dst": dst})
	}
	bridge := object{
		"type": "bridge", "bridge": n.cfg.Bridge, "isGateway": true, "hairpinMode": true, "ipMasq": false,
		"ipam": object{"type": "host-local", "dataDir": filepath.Join(n.cfg.StateDir, "ipam"), "ranges": ranges, "routes": routes},
	}
	if mtu > 0 {
		bridge["mtu"] = mtu
	}
	return json.MarshalIndent(object{"cniVersion": "0.4.0", "name": n.cfg.Name, "plugins": []object{bridge}}, "", "  ")
}

func forwarding() error {
	for _, path := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := setSysctl(path, "1"); err != nil {
			return fmt.Errorf("turn on forwarding: %w", err)
		}
	}
	return nil
}

// setSysctl sets a value below /proc/sys/net, where there is that family.
func setSysctl(path, value string) error {
	path = filepath.Join("/proc/sys/net", path)
	raw, err := hostile.ReadRegular(path, hostile.MaxOwn)
	if os.IsNotExist(err) || err == nil && strings.TrimSpace(string(raw)) == value {
		return nil
	}
	return os.WriteFile(path, []byte(value), 0o644)
}

// Remove takes down what this package made in the network namespace: the
// devices, the routes and the nftables table.
func Remove(cfg Config) error {
	var errs []error
	if link, err := netlink.LinkByName(cfg.Bridge); err == nil {
		errs = append(errs, netlink.LinkDel(link))
	}
	cfg.VXLAN = cfg.VXLAN.withDefaults()
	n := &Network{cfg: cfg, log: cfg.Logger}
	errs = append(errs, n.routes(nil), n.removeTunnel(), n.removeRules())
	return errors.Join(errs...)
}
