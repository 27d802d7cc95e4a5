package sched

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	resourcev1 "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
)

// epoch is when every scenario starts.
var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// TestScenarios plays the stories in testdata. Their commands:
//
//	nodes      one node a line: NAME cpu=4 memory=8Gi pods=110 zone=a
//	           label=k=v taint=k=v:Effect unschedulable
//	pods       one pod a line: [NAMESPACE/]NAME cpu= memory= on=NODE label=k=v
//	           priority= owner=RS age=SECONDS started=SECONDS tolerate=k deleting
//	           select=k=v phase= port= gate= scheduler= device=CLAIM
//	           template=CLAIM made=CLAIM=NAME
//	apply      objects in YAML, separated by ---
//	delete     KIND [NAMESPACE/]NAME a line
//	schedule   prints the plan; seed=N, commit (applies the plan), max=N,
//	           searches=N, nopreemption
//	where      prints the pods on each node
//
// After each change the incremental Cluster is compared with a new one by
// planning with both. go test ./sched -rewrite writes what is printed.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			s := &scenario{state: newState(), cfg: DefaultConfig()}
			s.cluster = Build(s.state)
			datadriven.RunTest(t, file, s.run)
		})
	}
}

type scenario struct {
	cfg     Config
	state   *fakeState
	cluster *Cluster
	changed []Ref
	created int
}

func (s *scenario) run(t *testing.T, d *datadriven.TestData) string {
	t.Helper()
	switch d.Cmd {
	case "nodes":
		for _, line := range lines(d.Input) {
			s.put(parseNode(t, d, line))
		}
	case "pods":
		for _, line := range lines(d.Input) {
			s.put(s.parsePod(t, d, line))
		}
	case "apply":
		decode := scheme.Codecs.UniversalDeserializer().Decode
		for _, doc := range strings.Split(d.Input, "\n---\n") {
			o, _, err := decode([]byte(doc), nil, nil)
			if err != nil {
				d.Fatalf(t, "%v", err)
			}
			switch o := o.(type) {
			case *corev1.Pod:
				s.complete(o)
			case *resourcev1.ResourceClaim:
				o.Namespace = "default"
				if o.UID == "" {
					o.UID = types.UID(o.Name)
				}
				if o.ResourceVersion == "" {
					o.ResourceVersion = "1"
				}
			}
			s.put(o)
		}
	case "delete":
		for _, line := range lines(d.Input) {
			kind, name, _ := strings.Cut(line, " ")
			namespace, name := splitName(name)
			if kind == "Node" || kind == "ResourceSlice" || kind == "DeviceTaintRule" || kind == "DeviceClass" {
				namespace = ""
			}
			delete(s.state.objects, kind+"/"+namespace+"/"+name)
			s.changed = append(s.changed, Ref{Kind(kind), namespace, name})
		}
	case "schedule":
		return s.schedule(t, d)
	case "where":
		return s.where()
	default:
		d.Fatalf(t, "unknown command %s", d.Cmd)
	}
	return ""
}

func (s *scenario) put(o runtime.Object) {
	s.state.put(o)
	m := o.(metav1.Object)
	s.changed = append(s.changed, Ref{Kind(kindOf(o)), m.GetNamespace(), m.GetName()})
}

func (s *scenario) schedule(t *testing.T, d *datadriven.TestData) string {
	var seed, maxPods int
	commit := d.HasArg("commit")
	d.MaybeScanArgs(t, "seed", &seed)
	d.MaybeScanArgs(t, "max", &maxPods)
	cfg := s.cfg
	cfg.MaxPods = maxPods
	d.MaybeScanArgs(t, "searches", &cfg.MaxVictimSearches)
	if d.HasArg("nopreemption") {
		cfg.Profiles[0].DisablePreemption = true
	}
	s.cluster = s.cluster.Advance(s.state, s.changed)
	s.changed = nil
	in := Input{Now: epoch.Add(time.Hour), Seed: uint64(seed), State: s.state, Cluster: s.cluster}
	plan, err := Schedule(cfg, in)
	if err != nil {
		return err.Error()
	}
	in.Cluster = nil
	if again, _ := Schedule(cfg, in); describePlan(again) != describePlan(plan) {
		d.Fatalf(t, "a Cluster built anew plans otherwise:\n%s\nincremental:\n%s", describePlan(again), describePlan(plan))
	}
	if commit {
		s.commit(plan)
	}
	return describePlan(plan)
}

// commit does what the runner would do.
func (s *scenario) commit(plan Plan) {
	for _, w := range plan.Releases {
		s.write(w.ClaimWrite)
	}
	for _, b := range plan.Bindings {
		for _, w := range b.ResourceClaims {
			s.write(w)
		}
		pod := b.Pod.DeepCopy()
		pod.Spec.NodeName = b.Node
		pod.Status.NominatedNodeName = ""
		pod.Status.StartTime = &metav1.Time{Time: epoch.Add(time.Hour)}
		s.put(pod)
	}
	for _, p := range plan.Preemptions {
		for _, victim := range p.Victims {
			delete(s.state.objects, keyOf(victim))
			s.changed = append(s.changed, Ref{KindPod, victim.Namespace, victim.Name})
		}
	}
	for _, f := range plan.Failures {
		pod := f.Pod.DeepCopy()
		pod.Status.NominatedNodeName = f.NominatedNode
		s.put(pod)
	}
	for _, w := range plan.Waiting {
		for _, c := range w.ResourceClaims {
			s.write(c)
		}
		if !w.Brief {
			pod := w.Pod.DeepCopy()
			pod.Status.NominatedNodeName = w.Node
			s.put(pod)
		}
		for _, c := range w.Claims {
			if c.Volume != nil {
				s.put(c.Volume)
				continue
			}
			claim := c.Claim.DeepCopy()
			metav1.SetMetaDataAnnotation(&claim.ObjectMeta, "volume.kubernetes.io/selected-node", w.Node)
			s.put(claim)
		}
	}
}

// write writes a claim, of which there is a new version then.
func (s *scenario) write(w ClaimWrite) {
	claim := w.Claim.DeepCopy()
	s.created++
	claim.ResourceVersion = strconv.Itoa(1000 + s.created)
	s.put(claim)
}

func (s *scenario) where() string {
	var out strings.Builder
	for _, node := range list[*corev1.Node](s.state) {
		var names []string
		for _, pod := range list[*corev1.Pod](s.state) {
			if pod.Spec.NodeName == node.Name {
				names = append(names, shortName(pod))
			}
		}
		fmt.Fprintf(&out, "%s: %s\n", node.Name, strings.Join(names, " "))
	}
	return out.String()
}

func shortName(pod *corev1.Pod) string {
	return strings.TrimPrefix(pod.Namespace+"/"+pod.Name, "default/")
}

// describePlan prints a plan for a person.
func describePlan(p Plan) string {
	var out strings.Builder
	for _, b := range p.Bindings {
		fmt.Fprintf(&out, "bind %s to %s\n", shortName(b.Pod), b.Node)
		describeClaims(&out, b.ResourceClaims)
	}
	for _, w := range p.Waiting {
		what := "volumes are bound"
		if len(w.Pod.Spec.ResourceClaims) > 0 {
			what = "claims are ready"
		}
		fmt.Fprintf(&out, "hold %s on %s until its %s\n", shortName(w.Pod), w.Node, what)
		describeClaims(&out, w.ResourceClaims)
		for _, c := range w.Claims {
			if c.Volume == nil {
				fmt.Fprintf(&out, "  provision claim %s on %s\n", c.Claim.Name, w.Node)
			} else {
				fmt.Fprintf(&out, "  bind claim %s to volume %s\n", c.Claim.Name, c.Volume.Name)
			}
		}
	}
	for _, w := range p.Releases {
		if w.Pod != nil {
			fmt.Fprintf(&out, "release for %s\n", shortName(w.Pod))
		}
		describeClaims(&out, []ClaimWrite{w.ClaimWrite})
	}
	for _, g := range p.Gated {
		fmt.Fprintf(&out, "gated %s: %s\n", shortName(g.Pod), g.Message)
	}
	for _, pre := range p.Preemptions {
		var names []string
		for _, v := range pre.Victims {
			names = append(names, shortName(v))
		}
		fmt.Fprintf(&out, "evict %s from %s for %s", strings.Join(names, ", "), pre.Node, shortName(pre.Pod))
		if pre.Violations > 0 {
			fmt.Fprintf(&out, " (%d against a budget)", pre.Violations)
		}
		out.WriteByte('\n')
	}
	for _, f := range p.Failures {
		fmt.Fprintf(&out, "%s %s: %s\n", f.Reason, shortName(f.Pod), f.Message)
		if f.NominatedNode != "" {
			fmt.Fprintf(&out, "  nominated to %s\n", f.NominatedNode)
		}
	}
	if p.Remaining > 0 {
		fmt.Fprintf(&out, "%d pods not tried yet\n", p.Remaining)
	}
	if out.Len() == 0 {
		return "nothing to do\n"
	}
	return out.String()
}

func describeClaims(out *strings.Builder, writes []ClaimWrite) {
	for _, w := range writes {
		if !w.Status {
			fmt.Fprintf(out, "  claim %s: finalizers %q\n", w.Claim.Name, w.Claim.Finalizers)
			continue
		}
		if w.Claim.Status.Allocation == nil {
			fmt.Fprintf(out, "  claim %s: no devices\n", w.Claim.Name)
			continue
		}
		fmt.Fprintf(out, "  claim %s:", w.Claim.Name)
		for _, r := range w.Claim.Status.Allocation.Devices.Results {
			fmt.Fprintf(out, " %s=%s/%s", r.Request, r.Pool, r.Device)
			for _, name := range slices.Sorted(maps.Keys(r.ConsumedCapacity)) {
				q := r.ConsumedCapacity[name]
				fmt.Fprintf(out, "(%s)", q.String())
			}
		}
		out.WriteString(" for")
		for _, r := range w.Claim.Status.ReservedFor {
			out.WriteString(" " + r.Name)
		}
		out.WriteByte('\n')
	}
}

func lines(input string) []string {
	return slices.DeleteFunc(strings.Split(input, "\n"), func(l string) bool {
		return strings.TrimSpace(l) == "" || strings.HasPrefix(l, "#")
	})
}

func splitName(s string) (namespace, name string) {
	if ns, name, ok := strings.Cut(s, "/"); ok {
		return ns, name
	}
	return "default", s
}

func quantity(t *testing.T, d *datadriven.TestData, s string) resource.Quantity {
	q, err := resource.ParseQuantity(s)
	if err != nil {
		d.Fatalf(t, "quantity %q: %v", s, err)
	}
	return q
}

func number(t *testing.T, d *datadriven.TestData, s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		d.Fatalf(t, "number %q: %v", s, err)
	}
	return n
}

func parseNode(t *testing.T, d *datadriven.TestData, line string) *corev1.Node {
	words := strings.Fields(line)
	n := makeNode(words[0])
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "cpu", "memory", "pods", "ephemeral-storage":
			n.Status.Allocatable[corev1.ResourceName(key)] = quantity(t, d, value)
		case "zone":
			n.Labels[corev1.LabelTopologyZone] = value
		case "label":
			k, v, _ := strings.Cut(value, "=")
			n.Labels[k] = v
		case "taint":
			kv, effect, _ := strings.Cut(value, ":")
			k, v, _ := strings.Cut(kv, "=")
			n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: k, Value: v, Effect: corev1.TaintEffect(effect)})
		case "unschedulable":
			n.Spec.Unschedulable = true
		case "image":
			name, size, _ := strings.Cut(value, "@")
			q := quantity(t, d, size)
			n.Status.Images = append(n.Status.Images, corev1.ContainerImage{Names: []string{name}, SizeBytes: q.Value()})
		default:
			if !strings.Contains(key, "/") {
				d.Fatalf(t, "unknown word %q", w)
			}
			n.Status.Allocatable[corev1.ResourceName(key)] = quantity(t, d, value)
		}
	}
	return n
}

// makeNode is a node of 4 cores, 8 GiB and 110 pods.
func makeNode(name string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name), Labels: map[string]string{corev1.LabelHostname: name}},
		Status: corev1.NodeStatus{Allocatable: corev1.ResourceList{
			corev1.ResourceCPU:    resource.MustParse("4"),
			corev1.ResourceMemory: resource.MustParse("8Gi"),
			corev1.ResourcePods:   resource.MustParse("110"),
		}},
	}
}

// complete sets what the API server would.
func (s *scenario) complete(pod *corev1.Pod) {
	s.created++
	if pod.Namespace == "" {
		pod.Namespace = "default"
	}
	if pod.CreationTimestamp.IsZero() {
		pod.CreationTimestamp = metav1.Time{Time: epoch.Add(time.Duration(s.created) * time.Second)}
	}
	if pod.Spec.SchedulerName == "" {
		pod.Spec.SchedulerName = corev1.DefaultSchedulerName
	}
	if pod.UID == "" {
		pod.UID = types.UID(pod.Namespace + "/" + pod.Name)
	}
}

func (s *scenario) parsePod(t *testing.T, d *datadriven.TestData, line string) *corev1.Pod {
	words := strings.Fields(line)
	namespace, name := splitName(words[0])
	requests := corev1.ResourceList{}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "app"}}},
	}
	main := &pod.Spec.Containers[0]
	main.Resources.Requests = requests
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "cpu", "memory", "ephemeral-storage":
			requests[corev1.ResourceName(key)] = quantity(t, d, value)
		case "on":
			pod.Spec.NodeName = value
		case "nominated":
			pod.Status.NominatedNodeName = value
		case "label":
			k, v, _ := strings.Cut(value, "=")
			pod.Labels[k] = v
		case "select":
			k, v, _ := strings.Cut(value, "=")
			if pod.Spec.NodeSelector == nil {
				pod.Spec.NodeSelector = map[string]string{}
			}
			pod.Spec.NodeSelector[k] = v
		case "priority":
			p := int32(number(t, d, value))
			pod.Spec.Priority = &p
		case "age":
			pod.CreationTimestamp = metav1.Time{Time: epoch.Add(-time.Duration(number(t, d, value)) * time.Second)}
		case "started":
			pod.Status.StartTime = &metav1.Time{Time: epoch.Add(time.Duration(number(t, d, value)) * time.Second)}
		case "tolerate":
			pod.Spec.Tolerations = append(pod.Spec.Tolerations, corev1.Toleration{Key: value, Operator: corev1.TolerationOpExists})
		case "deleting":
			pod.DeletionTimestamp = &metav1.Time{Time: epoch}
		case "phase":
			pod.Status.Phase = corev1.PodPhase(value)
		case "port":
			main.Ports = append(main.Ports, corev1.ContainerPort{HostPort: int32(number(t, d, value)), ContainerPort: 80})
		case "gate":
			pod.Spec.SchedulingGates = append(pod.Spec.SchedulingGates, corev1.PodSchedulingGate{Name: value})
		case "scheduler":
			pod.Spec.SchedulerName = value
		case "image":
			main.Image = value
		case "never":
			never := corev1.PreemptNever
			pod.Spec.PreemptionPolicy = &never
		case "claim":
			pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: value, VolumeSource: corev1.VolumeSource{
				PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: value},
			}})
		case "device": // a ResourceClaim
			pod.Spec.ResourceClaims = append(pod.Spec.ResourceClaims, corev1.PodResourceClaim{Name: value, ResourceClaimName: &value})
		case "template": // the ResourceClaim made of one, for the pod, if there is one
			pod.Spec.ResourceClaims = append(pod.Spec.ResourceClaims, corev1.PodResourceClaim{Name: value, ResourceClaimTemplateName: &value})
		case "made": // CLAIM=NAME: the name of what was made of a template
			claim, name, _ := strings.Cut(value, "=")
			pod.Status.ResourceClaimStatuses = append(pod.Status.ResourceClaimStatuses, corev1.PodResourceClaimStatus{Name: claim, ResourceClaimName: &name})
		case "owner":
			s.own(pod, value)
		default:
			if !strings.Contains(key, "/") {
				d.Fatalf(t, "unknown word %q", w)
			}
			requests[corev1.ResourceName(key)] = quantity(t, d, value)
		}
	}
	s.complete(pod)
	return pod
}

// own makes a ReplicaSet that selects app=NAME the owner of the pod.
func (s *scenario) own(pod *corev1.Pod, name string) {
	yes := true
	pod.Labels["app"] = name
	pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: name, UID: types.UID(name), Controller: &yes}}
	s.state.put(replicaSet(pod.Namespace, name))
}

// replicaSet is one that selects app=NAME.
func replicaSet(namespace, name string) *appsv1.ReplicaSet {
	return &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       appsv1.ReplicaSetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": name}}},
	}
}
