package sched

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	resourcev1 "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"timonel/state/objects"
)

func deviceClass(name string) *resourcev1.DeviceClass {
	return &resourcev1.DeviceClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: resourcev1.DeviceClassSpec{Selectors: []resourcev1.DeviceSelector{
		{CEL: &resourcev1.CELDeviceSelector{Expression: fmt.Sprintf("device.driver == %q", name+".example.com")}},
	}}}
}

// deviceSlice is all devices of a driver on a node, one pool.
func deviceSlice(class, node string, devices ...resourcev1.Device) *resourcev1.ResourceSlice {
	return &resourcev1.ResourceSlice{ObjectMeta: metav1.ObjectMeta{Name: class + "-" + node}, Spec: resourcev1.ResourceSliceSpec{
		Driver: class + ".example.com", NodeName: &node, Devices: devices,
		Pool: resourcev1.ResourcePool{Name: node, Generation: 1, ResourceSliceCount: 1},
	}}
}

func deviceNames(n int) (out []resourcev1.Device) {
	for i := range n {
		out = append(out, resourcev1.Device{Name: fmt.Sprintf("d%d", i)})
	}
	return out
}

func deviceClaim(name, class string, count int64) *resourcev1.ResourceClaim {
	return &resourcev1.ResourceClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("claim-" + name), ResourceVersion: "1"},
		Spec: resourcev1.ResourceClaimSpec{Devices: resourcev1.DeviceClaim{Requests: []resourcev1.DeviceRequest{{
			Name: "r", Exactly: &resourcev1.ExactDeviceRequest{DeviceClassName: class, AllocationMode: resourcev1.DeviceAllocationModeExactCount, Count: count},
		}}}},
	}
}

func claiming(pod *corev1.Pod, claims ...string) *corev1.Pod {
	for _, name := range claims {
		pod.Spec.ResourceClaims = append(pod.Spec.ResourceClaims, corev1.PodResourceClaim{Name: name, ResourceClaimName: &name})
	}
	return pod
}

// deviceWorld is a cluster whose API answers writes of claims as it likes: at once, never,
// late, or with no.
type deviceWorld struct {
	t       *rapid.T
	state   *fakeState
	before  map[string]runtime.Object
	cfg     *compiled
	cluster *Cluster
	queue   *Queue
	now     time.Time
	version int
	// late are chains of writes without an answer, which may yet be carried out.
	late []chain
	// refused are the claims that were refused, for good.
	refused []*resourcev1.ResourceClaim
}

// chain is writes that are made one after another, and what is done then.
type chain struct {
	writes []ClaimWrite
	pod    *corev1.Pod
	node   string
}

func newDeviceWorld(t *rapid.T, cfg Config, list ...runtime.Object) *deviceWorld {
	w := &deviceWorld{t: t, state: newState(list...), cfg: mustCompile(t, cfg), now: epoch.Add(time.Hour), version: 10}
	w.lead()
	return w
}

// lead makes another replica the leader: it knows the state alone.
func (w *deviceWorld) lead() {
	w.cluster, w.queue = Build(w.state), newQueue(w.cfg)
	w.queue.follow(objects.Changes{Reset: true}, w.cluster, w.state, w.now)
	w.before = maps.Clone(w.state.objects)
	w.late, w.refused = nil, nil // they are of an earlier term
}

// follow shows the queue what has changed.
func (w *deviceWorld) follow() {
	changes := changesBetween(w.before, w.state.objects)
	w.cluster = w.cluster.Advance(w.state, Refs(changes.Changed))
	w.queue.follow(changes, w.cluster, w.state, w.now)
	w.before = maps.Clone(w.state.objects)
	for _, claim := range w.refused {
		w.queue.RefusedClaim(claim, w.now)
	}
	w.refused = nil
}

// write does what the API does with a claim of one version.
func (w *deviceWorld) write(write ClaimWrite) bool {
	is, ok := w.state.ResourceClaim(write.Claim.Namespace, write.Claim.Name)
	if !ok || is.UID != write.Claim.UID || is.ResourceVersion != write.Claim.ResourceVersion {
		return false
	}
	next := is.DeepCopy()
	if write.Status {
		next.Status = *write.Claim.Status.DeepCopy()
	} else {
		next.Finalizers = slices.Clone(write.Claim.Finalizers)
	}
	w.version++
	next.ResourceVersion = strconv.Itoa(w.version)
	w.state.put(next)
	return true
}

func (w *deviceWorld) carryOut(c chain) {
	for _, write := range c.writes {
		if !w.write(write) {
			return
		}
	}
	if c.node == "" {
		return
	}
	if is, ok := w.state.Pod(c.pod.Namespace, c.pod.Name); ok && is.UID == c.pod.UID && is.Spec.NodeName == "" {
		bound := is.DeepCopy()
		bound.Spec.NodeName = c.node
		w.state.put(bound)
	}
}

// commit carries out a plan, or some of it.
func (w *deviceWorld) commit(plan Plan, calm bool) {
	chains := []chain{}
	for _, b := range plan.Bindings {
		chains = append(chains, chain{b.ResourceClaims, b.Pod, b.Node})
	}
	for _, h := range plan.Waiting {
		chains = append(chains, chain{h.ResourceClaims, h.Pod, ""})
	}
	for _, r := range plan.Releases {
		chains = append(chains, chain{[]ClaimWrite{r.ClaimWrite}, r.Pod, ""})
	}
	for _, c := range chains {
		fate := 0
		if !calm {
			fate = rapid.IntRange(0, 9).Draw(w.t, "fate")
		}
		switch fate {
		case 1: // no answer, and it comes yet
			w.late = append(w.late, c)
		case 2: // no answer, and part of it is done
			if len(c.writes) > 0 {
				w.write(c.writes[0])
			}
		case 3: // lost
		case 4: // refused
			if len(c.writes) > 0 {
				w.refused = append(w.refused, c.writes[0].Claim)
			}
		default:
			w.carryOut(c)
		}
	}
}

func (w *deviceWorld) pass(calm bool) Plan {
	plan, err := w.cfg.schedule(Input{Now: w.now, Seed: rapid.Uint64().Draw(w.t, "seed"), State: w.state, Cluster: w.cluster, Pods: w.queue.Ready(w.now), Held: w.queue.heldClaims()})
	if err != nil {
		w.t.Fatal(err)
	}
	w.queue.Tried(plan, w.now)
	w.commit(plan, calm)
	return plan
}

// check asserts that no device has two claims, and that pods on nodes have theirs there.
func (w *deviceWorld) check() {
	owners := map[string]string{}
	for claim := range w.state.ResourceClaims() {
		if claim.Status.Allocation == nil {
			continue
		}
		if !slices.Contains(claim.Finalizers, resourcev1.Finalizer) {
			w.t.Fatalf("claim %s has devices and no finalizer", claim.Name)
		}
		for _, r := range claim.Status.Allocation.Devices.Results {
			id := r.Driver + "/" + r.Pool + "/" + r.Device
			if other := owners[id]; other != "" {
				w.t.Fatalf("device %s is of claims %s and %s", id, other, claim.Name)
			}
			owners[id] = claim.Name
		}
	}
	for pod := range w.state.Pods() {
		if pod.Spec.NodeName == "" {
			continue
		}
		claims, err := userClaims(w.state, pod)
		if err != nil {
			w.t.Fatalf("pod %s is on %s: %s", pod.Name, pod.Spec.NodeName, err)
		}
		for _, claim := range claims {
			if claim.Status.Allocation == nil || !slices.ContainsFunc(claim.Status.ReservedFor, func(r resourcev1.ResourceClaimConsumerReference) bool { return r.UID == pod.UID }) {
				w.t.Fatalf("pod %s is on %s, claim %s is not its own: %v", pod.Name, pod.Spec.NodeName, claim.Name, claim.Status)
			}
			for _, r := range claim.Status.Allocation.Devices.Results {
				if r.Pool != pod.Spec.NodeName {
					w.t.Fatalf("pod %s is on %s, its device in %s", pod.Name, pod.Spec.NodeName, r.Pool)
				}
			}
		}
	}
}

// TestNoDeviceHasTwoClaims plays a cluster whose API is late, forgetful and refuses, whose
// leader changes, and whose devices come and go. No device is ever two claims', and once
// the API answers, all that fit are placed and no queue leaves one aside that would be.
func TestNoDeviceHasTwoClaims(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := newDeviceWorld(t, DefaultConfig(), deviceClass("gpu"), deviceClass("nic"))
		nodes := rapid.IntRange(1, 3).Draw(t, "nodes")
		for i := range nodes {
			name := fmt.Sprintf("n%d", i)
			w.state.put(makeNode(name), deviceSlice("gpu", name, deviceNames(rapid.IntRange(0, 3).Draw(t, "gpus"))...), deviceSlice("nic", name, deviceNames(rapid.IntRange(0, 2).Draw(t, "nics"))...))
		}
		claims := rapid.IntRange(1, 6).Draw(t, "claims")
		for i := range claims {
			w.state.put(deviceClaim(fmt.Sprintf("c%d", i), rapid.SampledFrom([]string{"gpu", "nic"}).Draw(t, "class"), int64(rapid.IntRange(1, 2).Draw(t, "count"))))
		}
		w.lead()
		for step := range rapid.IntRange(1, 12).Draw(t, "steps") {
			switch rapid.IntRange(0, 4).Draw(t, "event") {
			case 0, 1:
				p := simplePod(fmt.Sprintf("p%d", step), "cpu", "1")
				p.UID, p.CreationTimestamp = types.UID(p.Name), metav1.Time{Time: epoch.Add(time.Duration(step) * time.Second)}
				for range rapid.IntRange(1, 2).Draw(t, "of") {
					claiming(p, fmt.Sprintf("c%d", rapid.IntRange(0, claims-1).Draw(t, "claim")))
				}
				w.state.put(p)
			case 2:
				name := fmt.Sprintf("n%d", rapid.IntRange(0, nodes-1).Draw(t, "slice of"))
				w.state.put(deviceSlice("gpu", name, deviceNames(rapid.IntRange(0, 3).Draw(t, "gpus"))...))
			case 3: // a pod ends, and what it has is given back
				for pod := range w.state.Pods() {
					delete(w.state.objects, keyOf(pod))
					for claim := range w.state.ResourceClaims() {
						next := claim.DeepCopy()
						next.Status.ReservedFor = slices.DeleteFunc(next.Status.ReservedFor, func(r resourcev1.ResourceClaimConsumerReference) bool { return r.UID == pod.UID })
						if len(next.Status.ReservedFor) == len(claim.Status.ReservedFor) {
							continue
						}
						if len(next.Status.ReservedFor) == 0 {
							next.Status.Allocation = nil
						}
						w.version++
						next.ResourceVersion = strconv.Itoa(w.version)
						w.state.put(next)
					}
					break
				}
			case 4:
				if rapid.IntRange(0, 2).Draw(t, "leader") == 0 {
					w.lead()
				}
			}
			w.now = w.now.Add(rapid.SampledFrom([]time.Duration{time.Millisecond, 11 * time.Second}).Draw(t, "later"))
			w.follow()
			w.pass(false)
			if len(w.late) > 0 && rapid.Bool().Draw(t, "late") {
				w.carryOut(w.late[0])
				w.late = w.late[1:]
			}
			w.check()
		}
		passes := 0
		for quiet := 0; quiet < 3; quiet++ { // one pod at a time gets on a claim that several share
			if passes++; passes > 100 {
				t.Fatalf("there is no rest: %s", describePlan(w.pass(true)))
			}
			w.now = w.now.Add(11 * time.Second)
			w.follow()
			if plan := w.pass(true); len(plan.Bindings)+len(plan.Waiting)+len(plan.Releases) > 0 {
				quiet = -1
			}
			w.check()
		}
		for pod := range w.state.Pods() {
			if pod.Spec.NodeName != "" {
				continue
			}
			plan, err := Schedule(w.cfg.Config, Input{Now: w.now, State: w.state, Pods: slices.Values([]*corev1.Pod{pod})})
			if err != nil || len(plan.Failures)+len(plan.Gated) != 1 {
				t.Fatalf("pod %s fits and is left aside: %s %v\nit waits for %b; held: %v", pod.Name, describePlan(plan), err, w.queue.pods[podKey("default", pod.Name)].why, w.queue.heldClaims())
			}
		}
	})
}

// TestSharesOfDevices checks that what is taken of a device that several claims share is
// what they ask for together, with names of the shares that repeat.
func TestSharesOfDevices(t *testing.T) {
	t.Parallel()
	yes := true
	device := resourcev1.Device{Name: "d", AllowMultipleAllocations: &yes, Capacity: map[resourcev1.QualifiedName]resourcev1.DeviceCapacity{"memory": {Value: resource.MustParse("10Gi")}}}
	state := newState(makeNode("n"), deviceClass("gpu"), deviceSlice("gpu", "n", device))
	for i := range 4 {
		c := deviceClaim(fmt.Sprintf("c%d", i), "gpu", 1)
		c.Finalizers = []string{resourcev1.Finalizer}
		c.Spec.Devices.Requests[0].Exactly.Capacity = &resourcev1.CapacityRequirements{Requests: map[resourcev1.QualifiedName]resource.Quantity{"memory": resource.MustParse("3Gi")}}
		p := claiming(simplePod(fmt.Sprintf("p%d", i), "cpu", "100m"), c.Name)
		p.UID, p.CreationTimestamp = types.UID(p.Name), metav1.Time{Time: epoch.Add(time.Duration(i) * time.Second)}
		state.put(c, p)
	}
	plan, err := Schedule(DefaultConfig(), Input{State: state, Seed: 1})
	if err != nil || len(plan.Bindings) != 3 || len(plan.Failures) != 1 || plan.Failures[0].Pod.Name != "p3" {
		t.Fatalf("of 10Gi in shares of 3Gi: %s %v", describePlan(plan), err)
	}
	again, _ := Schedule(DefaultConfig(), Input{State: state, Seed: 1})
	ids := map[types.UID]bool{}
	for i, b := range plan.Bindings {
		id := b.ResourceClaims[0].Claim.Status.Allocation.Devices.Results[0].ShareID
		ids[*id] = true
		if other := again.Bindings[i].ResourceClaims[0].Claim.Status.Allocation.Devices.Results[0].ShareID; *other != *id {
			t.Errorf("share %s, and %s in the same plan", *id, *other)
		}
	}
	if len(ids) != 3 {
		t.Errorf("%d names of 3 shares", len(ids))
	}
}

// TestAllocatorEnds checks that a claim whose constraints can hardly be met holds up the
// scheduler for a moment alone, and says so.
func TestAllocatorEnds(t *testing.T) {
	t.Parallel()
	attribute := resourcev1.FullyQualifiedName("gpu.example.com/id")
	var many []resourcev1.Device
	for i := range 64 {
		id := fmt.Sprint(i / 2) // two of each: three alike are looked for in vain
		many = append(many, resourcev1.Device{Name: fmt.Sprintf("d%d", i), Attributes: map[resourcev1.QualifiedName]resourcev1.DeviceAttribute{"id": {StringValue: &id}}})
	}
	claim := deviceClaim("c", "gpu", 1)
	claim.Spec.Devices.Requests = nil
	for i := range 12 {
		claim.Spec.Devices.Requests = append(claim.Spec.Devices.Requests, resourcev1.DeviceRequest{
			Name: fmt.Sprintf("r%d", i), Exactly: &resourcev1.ExactDeviceRequest{DeviceClassName: "gpu", AllocationMode: resourcev1.DeviceAllocationModeExactCount, Count: 1},
		})
	}
	claim.Spec.Devices.Constraints = []resourcev1.DeviceConstraint{{Requests: []string{"r9", "r10", "r11"}, MatchAttribute: &attribute}}
	state := newState(makeNode("n"), deviceClass("gpu"), deviceSlice("gpu", "n", many...), claim, claiming(simplePod("p"), "c"), simplePod("q"))
	started := time.Now()
	plan, err := Schedule(DefaultConfig(), Input{State: state})
	if err != nil || len(plan.Bindings) != 1 || len(plan.Failures) != 1 {
		t.Fatalf("%s %v", describePlan(plan), err)
	}
	if f := plan.Failures[0]; f.Reason != corev1.PodReasonSchedulerError || f.Message != `running "DynamicResources" filter plugin: node n: timed out trying to allocate devices` {
		t.Errorf("%s: %s", f.Reason, f.Message)
	}
	t.Logf("%d steps took %s", allocatorSteps, time.Since(started))
}
