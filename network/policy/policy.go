package policy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os/exec"
	"reflect"
	"slices"
	"sync"
	"time"

	"sigs.k8s.io/knftables"

	"timonel/network/feed"
	"timonel/network/tables"
)

// refusedRest is after how long policies that the kernel does not take are tried again.
const refusedRest = time.Minute

// Rules keeps the tables of one node.
type Rules struct {
	cfg Config
	log *slog.Logger

	// What follows is Run's alone.
	rules, guard *table
	after        uint64 // revision of the View that was taken last
	looked       time.Time
	begun        bool                       // the tables were written once
	contents     map[string]map[string]*set // of groups, by group and set
	refused      map[feed.Name]error        // policies that the kernel does not take,
	refusedAt    time.Time                  // and when that was last tried
	said         map[string]string          // to whom of what

	mu      sync.Mutex
	pods    map[string]Pod // by uid; replaced when it changes, never changed
	guarded []Guarded
	changed uint64             // grows with both
	done    uint64             // changed, as it is in the tables
	view    *feed.View         // that is in the tables
	force   map[string]inForce // what is in them of a pod
	failed  error              // why the tables are not what they should be
	filter  bool               // bridges ask the tables
	waited  bool               // somebody was told to wait
	wake    context.CancelFunc
	stats   Stats
}

// inForce is what the tables have of a pod.
type inForce struct {
	pod     Pod
	known   bool  // of the policies
	refused error // why nothing is let through
	guard   error // why it is not held to its addresses
}

// New returns Rules, which change nothing before they run.
func New(cfg Config) (*Rules, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Look == 0 {
		cfg.Look = DefaultLook
	}
	if cfg.nft == nil {
		cfg.nft = func(family knftables.Family, table string) (knftables.Interface, error) {
			return knftables.New(family, table, knftables.UseNetlink)
		}
	}
	if cfg.Watcher == nil {
		cfg.Watcher = &tables.Watcher{}
	}
	return &Rules{
		cfg: cfg, log: cfg.Logger.With("component", "policy"),
		rules:    &table{name: cfg.Table, family: knftables.InetFamily, has: newRuleset(), broken: true},
		guard:    &table{name: cfg.Table, family: knftables.BridgeFamily, has: newRuleset(), broken: true},
		contents: map[string]map[string]*set{}, refused: map[feed.Name]error{}, said: map[string]string{},
		pods: map[string]Pod{}, force: map[string]inForce{}, changed: 1,
	}, nil
}

// SetPod says that a pod has its addresses now. All that run are to be said before Run.
func (r *Rules) SetPod(p Pod) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if had, ok := r.pods[p.UID]; ok && reflect.DeepEqual(had, p) {
		return
	}
	r.pods = maps.Clone(r.pods)
	r.pods[p.UID] = p
	r.touch()
}

// RemovePod says that nothing of a pod runs any more and that its addresses are free.
func (r *Rules) RemovePod(uid string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.pods[uid]; !ok {
		return
	}
	r.pods = maps.Clone(r.pods)
	delete(r.pods, uid)
	r.touch()
}

// SetGuarded says which ports pods do not reach.
func (r *Rules) SetGuarded(list []Guarded) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(list, r.guarded) {
		r.guarded = list
		r.touch()
	}
}

func (r *Rules) touch() {
	r.changed++
	if r.wake != nil {
		r.wake()
	}
}

// Ready says why nothing of a pod that was set may run yet; nil: all that holds for it is in
// the kernel. policies is the revision at which a controller saw that some policy does, 0:
// it saw none. When the answer may be another, Config.Changed is called.
func (r *Rules) Ready(uid string, policies int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.ready(uid, policies)
	if err != nil {
		r.waited = true
	}
	return err
}

func (r *Rules) ready(uid string, policies int64) error {
	pod, ok := r.pods[uid]
	f, has := r.force[uid]
	switch {
	case !ok:
		return errors.New("the pod has no address yet")
	case !has || !reflect.DeepEqual(f.pod, pod):
		if r.failed != nil {
			return fmt.Errorf("the kernel does not take the rules of network policies: %w", r.failed)
		}
		return errors.New("the rules of the pod's link are not in the kernel yet")
	case f.guard != nil:
		return fmt.Errorf("the kernel refuses the rules of the pod's link: %w", f.guard)
	}
	name := feed.Name{Namespace: pod.Namespace, Name: pod.Name}
	newest := r.cfg.Store.View()
	item := newest.Pod(name)
	if item.GetUid() != uid && (policies == 0 || newest.Synced() && newest.Told() >= policies) {
		return nil
	}
	switch {
	case item.GetUid() != uid:
		return errors.New("the controllers have not told yet which network policies hold for the pod")
	case !f.known || r.view.Pod(name).GetUid() != uid:
		return errors.New("the rules of the pod's network policies are not in the kernel yet")
	case f.refused != nil:
		return f.refused
	case !r.filter:
		return errors.New("the kernel module br_netfilter is not there, without which pods of one node reach each other whatever network policies say; load it with: modprobe br_netfilter")
	}
	return nil
}

// Run keeps the tables until ctx ends. They stay as they are then.
func (r *Rules) Run(ctx context.Context) error {
	if _, err := exec.LookPath("nft"); err != nil {
		r.log.Error("nft is not installed: no pod for which a network policy holds can start; install it with: apt-get install nftables")
		<-ctx.Done()
		return nil
	}
	for ctx.Err() == nil {
		r.pass(ctx)
		r.wait(ctx)
	}
	return nil
}

// wait is until something has changed, or it is time to look.
func (r *Rules) wait(ctx context.Context) {
	d := r.cfg.Look
	r.mu.Lock()
	if r.failed != nil {
		d = min(d, time.Second)
	}
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	r.wake = cancel
	changed, failed := r.changed != r.done, r.failed != nil
	r.mu.Unlock()
	if failed {
		<-ctx.Done() // or it would be tried without rest
		return
	}
	for after := r.after; !changed; {
		c, err := r.cfg.Store.Changes(ctx, after)
		if err != nil {
			return
		}
		after, changed = c.View.Revision(), c.Policy || c.Reset
	}
}

// pass brings the tables to what is known.
func (r *Rules) pass(ctx context.Context) {
	begun := time.Now()
	r.mu.Lock()
	pods, guarded, changed, failed := r.pods, r.guarded, r.changed, r.failed
	same := changed == r.done && failed == nil
	r.mu.Unlock()
	view := r.cfg.Store.View()
	policy := feed.Changes{View: view, Reset: r.after == 0, Policy: true}
	switch {
	case r.after != 0 && view.Revision() == r.after:
		policy.Policy = false
	case r.after != 0:
		var err error
		if policy, err = r.cfg.Store.Changes(ctx, r.after); err != nil {
			return
		}
		view = policy.View
	}
	look := begun.Sub(r.looked) >= r.cfg.Look
	filter := r.filter
	if look {
		filter = tables.BridgeFilter()
		r.looked = begun
		for _, t := range []*table{r.rules, r.guard} {
			if !t.broken && t.nft != nil && t.touched(ctx, r.log) {
				t.broken = true
			}
		}
	}
	if same && !policy.Policy && !policy.Reset && !r.rules.broken && !r.guard.broken && len(r.refused) == 0 && filter == r.filter {
		r.after = view.Revision()
		return
	}
	force, err := r.write(ctx, policy, pods, guarded)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		r.log.Error("the kernel does not take the rules of network policies; what was there stays, and it is tried again", "error", tables.Brief(err))
	} else {
		r.after = view.Revision()
	}
	r.tell(pods, force)
	if err == nil && r.begun {
		err = r.cut(force)
	}
	r.begun = r.begun || err == nil
	r.mu.Lock()
	r.failed, r.filter = err, filter
	if err == nil {
		r.done, r.force, r.view = changed, force, view
	}
	r.stats.took(time.Since(begun), err)
	tell := r.waited
	r.waited = false
	r.mu.Unlock()
	if tell && r.cfg.Changed != nil {
		r.cfg.Changed()
	}
}

func (r *Rules) open() error {
	for _, t := range []*table{r.rules, r.guard} {
		if t.nft != nil {
			continue
		}
		nft, err := r.cfg.nft(t.family, t.name)
		if err != nil {
			return fmt.Errorf("nftables: %w", err)
		}
		t.nft = t.trust.Watch(r.cfg.Watcher, nft)
	}
	return nil
}

// write brings both tables to a View, and says what they have of each pod then.
func (r *Rules) write(ctx context.Context, policy feed.Changes, pods map[string]Pod, guarded []Guarded) (map[string]inForce, error) {
	if err := r.open(); err != nil {
		return nil, err
	}
	view := policy.View
	force := map[string]inForce{}
	strict := map[string]bool{}
	for uid, pod := range pods {
		force[uid] = inForce{pod: pod, known: view.Synced()}
		strict[uid] = view.Pod(feed.Name{Namespace: pod.Namespace, Name: pod.Name}).GetUid() == uid
	}
	if !view.Synced() { // what an earlier agent left is better than nothing
		if list, err := r.rules.nft.ListAll(ctx); err == nil && len(list) > 0 {
			return force, r.writeGuard(ctx, pods, strict, force)
		}
	}
	in := input{view: view, pods: pods, bridge: r.cfg.Bridge, guarded: guarded, closed: maps.Clone(r.refused)}
	for name := range policy.PoliciesChanged {
		delete(in.closed, name) // it may be another one now
	}
	if policy.Reset || time.Since(r.refusedAt) > refusedRest {
		in.closed = map[feed.Name]error{}
	}
	r.forget(policy)
	var out output
	make := func(closed map[feed.Name]error) *ruleset {
		in.closed = closed
		out = compile(in)
		r.fill(out, view)
		return out.ruleset
	}
	if want := make(in.closed); r.rules.apply(ctx, want) != nil && ctx.Err() == nil {
		var names []feed.Name
		for p := range view.Policies() {
			names = append(names, feed.Name{Namespace: p.GetNamespace(), Name: p.GetName()})
		}
		closed, err := sift(ctx, r.rules, names, make)
		if err != nil {
			return nil, err
		}
		if err := r.rules.apply(ctx, make(closed)); err != nil {
			return nil, err
		}
		r.refusedAt = time.Now()
	} else if ctx.Err() != nil {
		r.rules.broken = true // it may have been carried out
		return nil, ctx.Err()
	}
	if r.refused = in.closed; len(r.refused) > 0 && r.refusedAt.IsZero() {
		r.refusedAt = time.Now()
	}
	maps.DeleteFunc(r.contents, func(g string, _ map[string]*set) bool { return !out.groups[g] && !out.ported[g] })
	for uid, err := range out.bad {
		f := force[uid]
		f.refused = err
		force[uid] = f
	}
	r.mu.Lock()
	r.stats.Policies, r.stats.Groups, r.stats.Rules, r.stats.Refused, r.stats.Pods = out.count, len(out.groups)+len(out.ported), r.rules.has.rules(), len(r.refused), len(pods)
	r.stats.Elements = 0
	for _, s := range r.rules.has.sets {
		r.stats.Elements += len(s.elements)
	}
	r.mu.Unlock()
	return force, r.writeGuard(ctx, pods, strict, force)
}

// forget drops what is known of groups that have changed.
func (r *Rules) forget(policy feed.Changes) {
	if policy.Reset {
		clear(r.contents)
	}
	for g := range policy.GroupsChanged {
		delete(r.contents, g)
	}
}

// fill puts into a table what the groups have in them.
func (r *Rules) fill(out output, view *feed.View) {
	all := maps.Clone(out.groups)
	maps.Copy(all, out.ported)
	for g := range all {
		sets, known := r.contents[g]
		if !known || out.groups[g] && !has(sets, "g", g) || out.ported[g] && !has(sets, "t", g) {
			parts, _ := view.Group(g)
			sets = members(parts, g, out.groups[g], out.ported[g])
			r.contents[g] = sets
		}
		for name, s := range sets {
			if kind := name[0]; kind == 'g' && out.groups[g] || kind == 't' && out.ported[g] {
				out.sets[name] = s
			}
		}
	}
}

func has(sets map[string]*set, kind, group string) bool {
	_, ok := sets[groupSet(kind, families[0], group)]
	return ok
}

// writeGuard holds the pods to their addresses.
func (r *Rules) writeGuard(ctx context.Context, pods map[string]Pod, strict map[string]bool, force map[string]inForce) error {
	make := func(closed map[string]error) *ruleset { return guard(pods, strict, closed) }
	if err := r.guard.apply(ctx, make(nil)); err == nil || ctx.Err() != nil {
		r.guard.broken = r.guard.broken || ctx.Err() != nil
		return ctx.Err()
	}
	bad, err := sift(ctx, r.guard, slices.Sorted(maps.Keys(pods)), make)
	if err != nil {
		return fmt.Errorf("rules of bridges: %w", err)
	}
	if err := r.guard.apply(ctx, make(bad)); err != nil {
		return fmt.Errorf("rules of bridges: %w", err)
	}
	for uid, why := range bad {
		f := force[uid]
		f.guard = why
		force[uid] = f
	}
	return nil
}

// tell says, once for as long as it is so, which pods are cut off since the kernel refuses
// a policy.
func (r *Rules) tell(pods map[string]Pod, force map[string]inForce) {
	for uid, f := range force {
		why := errors.Join(f.refused, f.guard)
		if why == nil {
			delete(r.said, uid)
			continue
		}
		text := fmt.Sprintf("nothing goes to and from the pod over the network: %v; look at nft list table inet %s on its node, and at dmesg there", why, r.cfg.Table)
		if r.said[uid] == text {
			continue
		}
		r.said[uid] = text
		r.log.Warn("network policy", "pod", f.pod.Namespace+"/"+f.pod.Name, "error", why)
		if r.cfg.Event != nil {
			r.cfg.Event(f.pod, ReasonRefused, text)
		}
	}
	for uid := range r.said {
		if _, is := pods[uid]; !is {
			delete(r.said, uid)
		}
	}
}

// Remove takes away the tables.
func Remove(ctx context.Context, name string) error {
	return tables.Remove(ctx, name, knftables.InetFamily, knftables.BridgeFamily)
}
