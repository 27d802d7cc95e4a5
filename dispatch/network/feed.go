package network

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"timonel/dispatch/network/policy"
	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
	"timonel/state/objects"
)

const (
	nodeKind    = pb.NetworkKind_NETWORK_KIND_NODE
	serviceKind = pb.NetworkKind_NETWORK_KIND_SERVICE
	sliceKind   = pb.NetworkKind_NETWORK_KIND_SLICE
	addressKind = pb.NetworkKind_NETWORK_KIND_ADDRESS
)

// Config says what a Feed works with.
type Config struct {
	ClusterID string
	Objects   *objects.Cache
	Checks    Checks
	// Bytes bounds all items. A fifth of it is for policies and the groups of pods that they
	// name; of that, and of the rest, a fourth are of one namespace at most.
	Bytes int64
	// Rate is about how many bytes a second changes may take to all agents here. A change
	// after quiet goes at once; when many follow, they are merged. Default 64 MiB.
	Rate   int
	Logger *slog.Logger
}

// longestPause bounds how long changes are merged.
const longestPause = time.Second

// Feed is the controllers' end of the network feed.
type Feed struct {
	cfg      Config
	log      *Log
	policies *policy.Fold

	recheck   chan struct{}
	listEvery time.Duration

	// Run alone uses these.
	routes   *Routes
	withheld map[wire.Key]string // why an item is left out
	used     map[string]int64    // bytes by namespace
	told     map[string]string   // of each node what was logged of its routes

	figures figures

	mu       sync.Mutex
	revision int64         // that the log has reached
	moved    chan struct{} // closed when revision moves
	streams  map[string]*stream
	lists    map[string]*rate.Limiter // of each node
}

// New returns a feed that is empty until Run.
func New(cfg Config) *Feed {
	if cfg.Rate == 0 {
		cfg.Rate = 64 << 20
	}
	policies := policy.New(policy.Config{Bytes: cfg.Bytes / 5, Logger: cfg.Logger})
	cfg.Bytes -= cfg.Bytes / 5
	return &Feed{
		cfg: cfg, log: NewLog(), policies: policies, recheck: make(chan struct{}, 1), listEvery: listEvery,
		routes: NewRoutes(cfg.Checks), withheld: make(map[wire.Key]string), used: make(map[string]int64), told: make(map[string]string),
		moved: make(chan struct{}), streams: make(map[string]*stream), lists: make(map[string]*rate.Limiter),
	}
}

// Recheck says that the checks of nodes' ranges and addresses say something else.
func (f *Feed) Recheck() {
	select {
	case f.recheck <- struct{}{}:
	default:
	}
}

// Run follows the objects until ctx ends, whose error it returns.
func (f *Feed) Run(ctx context.Context) error {
	var after int64
	for {
		changes, rechecked, err := f.wait(ctx, after)
		if err != nil {
			return err
		}
		fresh := f.tell(changes)
		if rechecked {
			f.tellRoutes(f.routes.Recheck())
		}
		if changes.Snapshot != nil {
			f.retry(changes.Snapshot)
			after = changes.Snapshot.Revision()
			f.reached(after)
		}
		f.figures.withheld.Store(uint64(len(f.withheld)))
		pause := f.pause(f.log.Publish(), fresh)
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}

func (f *Feed) reached(revision int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.revision = revision
	close(f.moved)
	f.moved = make(chan struct{})
}

// Wait returns when all that the objects' cache has of a revision, which it has
// reached, is told here.
func (f *Feed) Wait(ctx context.Context, revision int64) error {
	for {
		f.mu.Lock()
		at, moved := f.revision, f.moved
		f.mu.Unlock()
		if at >= revision {
			return nil
		}
		if c := f.cfg.Objects.ChangesNow(at); !c.Reset && len(c.Changed) == 0 {
			return nil // what happened since is no object
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("wait for what nodes are told at revision %d: %w", revision, ctx.Err())
		}
	}
}

// wait returns what changed, or that the checks did.
func (f *Feed) wait(ctx context.Context, after int64) (objects.Changes, bool, error) {
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		changes objects.Changes
		err     error
	}
	got := make(chan answer, 1)
	go func() {
		c, err := f.cfg.Objects.Changes(inner, after)
		got <- answer{c, err}
	}()
	select {
	case a := <-got:
		return a.changes, false, a.err
	case <-f.recheck:
		cancel()
		if a := <-got; a.err == nil { // came at the same time
			return a.changes, true, nil
		}
		return objects.Changes{}, true, ctx.Err()
	}
}

// pause is how long the next changes are merged, after so many bytes went to all, and so
// many in all to some.
func (f *Feed) pause(fresh int, some int64) time.Duration {
	f.mu.Lock()
	streams := len(f.streams)
	f.mu.Unlock()
	return min(time.Duration((float64(fresh)*float64(streams)+float64(some))/float64(f.cfg.Rate)*float64(time.Second)), longestPause)
}

// tell takes changes, and returns how many bytes of policies go to nodes for them.
func (f *Feed) tell(changes objects.Changes) int64 {
	if changes.Snapshot == nil {
		return 0
	}
	if changes.Reset {
		f.reload(changes.Snapshot)
		return f.reloadPolicies(changes.Snapshot)
	}
	for _, c := range changes.Changed {
		f.apply(c)
	}
	return f.applyPolicies(changes)
}

func (f *Feed) apply(c objects.Changed) {
	m := c.Meta()
	switch o := m.Object.(type) {
	case *corev1.Service:
		f.setService(o, c.New == nil)
	case *discoveryv1.EndpointSlice:
		f.setSlice(o, c.New == nil)
	case *coordinationv1.Lease:
		f.setAddress(o, c.New == nil)
	case *corev1.Node:
		if c.New == nil {
			f.tellRoutes(f.routes.Remove(o.Name))
		} else {
			f.tellRoutes(f.routes.Set(o))
		}
	}
}

type marshaler interface{ Marshal() ([]byte, error) }

func (f *Feed) setService(o *corev1.Service, gone bool) {
	key := wire.Key{Kind: serviceKind, Namespace: o.Namespace, Name: o.Name}
	if gone {
		f.remove(key)
		return
	}
	f.put(key, stripService(o))
}

func (f *Feed) setSlice(o *discoveryv1.EndpointSlice, gone bool) {
	key := wire.Key{Kind: sliceKind, Namespace: o.Namespace, Name: o.Name}
	s := stripSlice(o)
	if gone || s == nil {
		f.remove(key)
		return
	}
	f.put(key, s)
}

// setAddress takes the Lease of an address of Services.
func (f *Feed) setAddress(l *coordinationv1.Lease, gone bool) {
	ip, ok := pb.LeasedAddress(l.Name, l.Annotations)
	if l.Namespace != pb.AddressNamespace || !ok {
		return
	}
	key := wire.Key{Kind: addressKind, Name: ip.String()}
	if gone {
		f.remove(key)
		return
	}
	holder := &pb.AddressHolder{Address: ip.String()}
	if l.Spec.HolderIdentity != nil {
		holder.NodeName = *l.Spec.HolderIdentity
	}
	var err error
	if holder.Number, err = strconv.ParseUint(l.ResourceVersion, 10, 64); err != nil {
		f.withhold(key, err.Error())
		return
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(holder)
	if err != nil {
		f.withhold(key, err.Error())
		return
	}
	f.putRaw(key, raw)
}

func (f *Feed) put(key wire.Key, o marshaler) {
	raw, err := o.Marshal()
	if err != nil {
		f.withhold(key, fmt.Sprintf("it cannot be encoded: %v", err))
		return
	}
	f.putRaw(key, raw)
}

func (f *Feed) putRaw(key wire.Key, raw []byte) {
	held, _ := f.log.Held()
	was, size := f.log.Weight(key), weight(key, raw)
	switch {
	case len(raw) > wire.MaxItem:
		f.withhold(key, fmt.Sprintf("it has %d bytes, nodes are told of %d", len(raw), wire.MaxItem))
		return
	case held-was+size > f.cfg.Bytes:
		f.withhold(key, fmt.Sprintf("all Services and slices have more than %d MiB", f.cfg.Bytes>>20))
		return
	case key.Namespace != "" && f.used[key.Namespace]-was+size > f.cfg.Bytes/4:
		f.withhold(key, fmt.Sprintf("those of the namespace have more than %d MiB", f.cfg.Bytes>>22))
		return
	}
	delete(f.withheld, key)
	f.log.Set(key, raw)
	f.use(key.Namespace, size-was)
}

func (f *Feed) use(namespace string, n int64) {
	if f.used[namespace] += n; f.used[namespace] == 0 {
		delete(f.used, namespace)
	}
}

func (f *Feed) remove(key wire.Key) {
	delete(f.withheld, key)
	was := f.log.Weight(key)
	f.log.Remove(key)
	f.use(key.Namespace, -was)
}

// withhold leaves an item out: what nodes knew of it before would be wrong.
func (f *Feed) withhold(key wire.Key, why string) {
	_, again := f.withheld[key]
	f.remove(key)
	f.withheld[key] = why
	if !again {
		f.cfg.Logger.Error("nodes are not told of an object; make it smaller or delete what is not needed", "object", key.String(), "reason", why)
	}
}

// retry puts what was left out when there may be room for it now.
func (f *Feed) retry(s *objects.Snapshot) {
	if len(f.withheld) == 0 {
		return
	}
	held, _ := f.log.Held()
	for _, key := range slices.Collect(maps.Keys(f.withheld)) {
		if held > f.cfg.Bytes/16*15 || f.used[key.Namespace] > f.cfg.Bytes/64*15 {
			continue
		}
		switch key.Kind {
		case serviceKind:
			if o, ok := s.Services().Get(key.Namespace, key.Name); ok {
				f.setService(o, false)
			}
		case sliceKind:
			if o, ok := s.EndpointSlices().Get(key.Namespace, key.Name); ok {
				f.setSlice(o, false)
			}
		}
	}
}

// tellRoutes puts what is told of some nodes.
func (f *Feed) tellRoutes(nodes map[string]struct{}) {
	for name := range nodes {
		key := wire.Key{Kind: nodeKind, Name: name}
		route, why := f.routes.Route(name)
		f.sayWrong(name, why)
		if route == nil {
			f.remove(key)
			continue
		}
		raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(route)
		if err != nil {
			f.withhold(key, err.Error())
			continue
		}
		f.putRaw(key, raw)
	}
}

func (f *Feed) sayWrong(node string, why []string) {
	if len(why) == 0 {
		delete(f.told, node)
		return
	}
	if text := fmt.Sprint(why); f.told[node] != text {
		f.told[node] = text
		f.cfg.Logger.Warn("other nodes are not told of what is not a node's own: delete the Node, and its agent registers anew", "node", node, "reasons", why)
	}
}

// reload makes all as a snapshot has it.
func (f *Feed) reload(s *objects.Snapshot) {
	seen := make(map[wire.Key]struct{})
	for o := range s.Services().All() {
		seen[wire.Key{Kind: serviceKind, Namespace: o.Namespace, Name: o.Name}] = struct{}{}
		f.setService(o, false)
	}
	for o := range s.EndpointSlices().All() {
		seen[wire.Key{Kind: sliceKind, Namespace: o.Namespace, Name: o.Name}] = struct{}{}
		f.setSlice(o, false)
	}
	for o := range s.Leases().Named(pb.AddressNamespace, pb.AddressLease) {
		if ip, ok := pb.LeasedAddress(o.Name, o.Annotations); ok {
			seen[wire.Key{Kind: addressKind, Name: ip.String()}] = struct{}{}
			f.setAddress(o, false)
		}
	}
	for o := range s.Nodes().All() {
		seen[wire.Key{Kind: nodeKind, Name: o.Name}] = struct{}{}
		f.tellRoutes(f.routes.Set(o))
	}
	for _, key := range slices.Concat(f.log.Keys(), slices.Collect(maps.Keys(f.withheld))) {
		if _, ok := seen[key]; ok {
			continue
		}
		if key.Kind == nodeKind {
			f.tellRoutes(f.routes.Remove(key.Name))
			continue
		}
		f.remove(key)
	}
}
