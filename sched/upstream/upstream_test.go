package upstream

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	resourcev1 "k8s.io/api/resource/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	fwk "k8s.io/kube-scheduler/framework"
	"k8s.io/kubernetes/pkg/scheduler/apis/config"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/latest"
	"k8s.io/kubernetes/pkg/scheduler/backend/cache"
	"k8s.io/kubernetes/pkg/scheduler/framework"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/names"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/nodevolumelimits"
	"k8s.io/kubernetes/pkg/scheduler/framework/runtime"
	"k8s.io/kubernetes/pkg/scheduler/metrics"
	"pgregory.net/rapid"

	"timonel/reconcile/upstream/profiles"
	"timonel/sched"
)

// TestSaysWhatUpstreamSays draws clusters and a pod, and compares for every node
// the reasons and, up to a constant, the scores. Upstream runs with its default
// profile, or with one that is drawn, without the plugins for what sched leaves out.
func TestSaysWhatUpstreamSays(t *testing.T) {
	metrics.Register()
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		cfg, err := latest.Default()
		if err != nil {
			t.Fatal(err)
		}
		if rapid.Bool().Draw(t, "profile") {
			cfg = drawConfig(t)
		}
		own, err := profiles.Convert(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ours, refused := sched.Explain(own, sched.Input{State: w}, "default", "p")
		theirs, theirRefusal := askUpstream(t, w, cfg.Profiles[0])
		if theirRefusal != "" || refused != nil {
			if begins := `running "DynamicResources" filter plugin`; strings.HasPrefix(theirRefusal, begins) && refused != nil && strings.Contains(refused.Error(), begins) {
				return // the nodes are asked in another order, and the first to fail speaks
			}
			if refused == nil || !strings.Contains(refused.Error(), theirRefusal) || theirRefusal == "" {
				t.Fatalf("upstream refuses the pod with %q, we with %v", theirRefusal, refused)
			}
			return
		}
		if len(ours) != len(theirs) {
			t.Fatalf("%d verdicts; upstream %d", len(ours), len(theirs))
		}
		constant, have := int64(0), false
		for _, v := range ours {
			u := theirs[v.Node]
			slices.Sort(v.Reasons)
			slices.Sort(u.reasons)
			if !slices.Equal(v.Reasons, u.reasons) {
				t.Fatalf("node %s: %q; upstream %q", v.Node, v.Reasons, u.reasons)
			}
			if pod, _ := w.Pod("default", "p"); len(v.Reasons) > 0 || pod.Spec.Resources != nil {
				// Upstream v1.37 filters by a new pod's own pod-level requests
				// and leaves them out of its free-resources score, though not
				// those of pods that run. We count them in both.
				continue
			}
			if !have {
				constant, have = u.score-v.Score, true
			}
			if u.score-v.Score != constant {
				t.Fatalf("node %s: score %d; upstream %d; elsewhere the difference is %d\n%v\n%v", v.Node, v.Score, u.score, constant, v.Scores, u.scores)
			}
		}
	})
}

type verdict struct {
	reasons []string
	score   int64
	scores  []fwk.PluginScore
}

// askUpstream runs the plugins for the pod on every node. A refusal says why no
// node was asked.
func askUpstream(t *rapid.T, w *world, profile config.KubeSchedulerProfile) (verdicts map[string]verdict, refusal string) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	profile.Plugins.MultiPoint.Enabled = slices.DeleteFunc(profile.Plugins.MultiPoint.Enabled, func(p config.Plugin) bool {
		switch p.Name {
		case names.GangScheduling, names.DefaultPreemption, names.TopologyPlacementGenerator, names.PodGroupPodsCount, names.DeferredPodScheduling:
			return true
		}
		return false
	})
	client := fake.NewClientset()
	factory := informers.NewSharedInformerFactory(client, 0)
	add := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	core, apps, storage := factory.Core().V1(), factory.Apps().V1(), factory.Storage().V1()
	for _, o := range w.namespaces {
		add(core.Namespaces().Informer().GetStore().Add(o))
	}
	for _, o := range w.services {
		add(core.Services().Informer().GetStore().Add(o))
	}
	for _, o := range w.replicaSets {
		add(apps.ReplicaSets().Informer().GetStore().Add(o))
	}
	for _, o := range w.claims {
		add(core.PersistentVolumeClaims().Informer().GetStore().Add(o))
	}
	for _, o := range w.volumes {
		add(core.PersistentVolumes().Informer().GetStore().Add(o))
	}
	for _, o := range w.classes {
		add(storage.StorageClasses().Informer().GetStore().Add(o))
	}
	for _, o := range w.csiNodes {
		add(storage.CSINodes().Informer().GetStore().Add(o))
	}
	for _, o := range w.csiDrivers {
		add(storage.CSIDrivers().Informer().GetStore().Add(o))
	}
	for _, o := range w.capacities {
		add(storage.CSIStorageCapacities().Informer().GetStore().Add(o))
	}
	for _, o := range w.attachments {
		add(storage.VolumeAttachments().Informer().GetStore().Add(o))
	}
	for _, o := range w.nodes {
		add(core.Nodes().Informer().GetStore().Add(o))
	}
	var running []*corev1.Pod
	for _, p := range w.pods {
		if p.Spec.NodeName != "" {
			running = append(running, p)
		}
	}
	snapshot := cache.NewSnapshot(running, w.nodes)
	f, err := runtime.NewFramework(ctx, plugins.NewInTreeRegistry(), &profile,
		runtime.WithSnapshotSharedLister(snapshot),
		runtime.WithInformerFactory(factory),
		runtime.WithClientSet(client),
		runtime.WithSharedDRAManager(devices{w: w}),
		runtime.WithSharedCSIManager(nodevolumelimits.NewCSIManager(storage.CSINodes().Lister())),
	)
	add(err)
	defer f.Close()
	pod, _ := w.Pod("default", "p")
	state := framework.NewCycleState()
	named, status, _ := f.RunPreFilterPlugins(ctx, state, pod)
	if !status.IsSuccess() {
		return nil, status.Message()
	}
	verdicts = map[string]verdict{}
	infos, err := snapshot.NodeInfos().List()
	add(err)
	var feasible []fwk.NodeInfo
	for _, n := range infos {
		if !named.AllNodes() && !named.NodeNames.Has(n.Node().Name) {
			t.Fatalf("the generator names no nodes")
		}
		status := f.RunFilterPlugins(ctx, state, pod, n)
		switch {
		case status.IsSuccess():
			feasible = append(feasible, n)
		case status.IsRejected():
			verdicts[n.Node().Name] = verdict{reasons: status.Reasons()}
		default:
			return nil, status.Message()
		}
	}
	if len(feasible) > 0 {
		if status := f.RunPreScorePlugins(ctx, state, pod, feasible); !status.IsSuccess() {
			t.Fatal(status.Message())
		}
		scores, status := f.RunScorePlugins(ctx, state, pod, feasible)
		if !status.IsSuccess() {
			t.Fatal(status.Message())
		}
		for _, s := range scores {
			v := verdict{scores: s.Scores}
			if len(feasible) > 1 {
				v.score = s.TotalScore
			}
			verdicts[s.Name] = v
		}
	}
	return verdicts, ""
}

// world is a cluster; its methods make it a sched.State.
type world struct {
	nodes       []*corev1.Node
	pods        []*corev1.Pod
	namespaces  []*corev1.Namespace
	services    []*corev1.Service
	replicaSets []*appsv1.ReplicaSet
	claims      []*corev1.PersistentVolumeClaim
	volumes     []*corev1.PersistentVolume
	classes     []*storagev1.StorageClass
	csiNodes    []*storagev1.CSINode
	csiDrivers  []*storagev1.CSIDriver
	capacities  []*storagev1.CSIStorageCapacity
	attachments []*storagev1.VolumeAttachment

	resourceClaims []*resourcev1.ResourceClaim
	deviceClasses  []*resourcev1.DeviceClass
	resourceSlices []*resourcev1.ResourceSlice
	taintRules     []*resourcev1.DeviceTaintRule
}

var _ sched.State = (*world)(nil)

func find[T metav1.Object](list []T, namespace, name string) (T, bool) {
	for _, o := range list {
		if o.GetNamespace() == namespace && o.GetName() == name {
			return o, true
		}
	}
	var none T
	return none, false
}

func (w *world) Nodes() iter.Seq[*corev1.Node]                   { return slices.Values(w.nodes) }
func (w *world) Node(name string) (*corev1.Node, bool)           { return find(w.nodes, "", name) }
func (w *world) Pods() iter.Seq[*corev1.Pod]                     { return slices.Values(w.pods) }
func (w *world) Pod(ns, name string) (*corev1.Pod, bool)         { return find(w.pods, ns, name) }
func (w *world) Namespaces() iter.Seq[*corev1.Namespace]         { return slices.Values(w.namespaces) }
func (w *world) Namespace(name string) (*corev1.Namespace, bool) { return find(w.namespaces, "", name) }
func (w *world) PersistentVolumes() iter.Seq[*corev1.PersistentVolume] {
	return slices.Values(w.volumes)
}
func (w *world) PersistentVolume(name string) (*corev1.PersistentVolume, bool) {
	return find(w.volumes, "", name)
}
func (w *world) PersistentVolumeClaim(ns, name string) (*corev1.PersistentVolumeClaim, bool) {
	return find(w.claims, ns, name)
}
func (w *world) StorageClass(name string) (*storagev1.StorageClass, bool) {
	return find(w.classes, "", name)
}
func (w *world) ReplicaSet(ns, name string) (*appsv1.ReplicaSet, bool) {
	return find(w.replicaSets, ns, name)
}
func (w *world) ServicesIn(ns string) iter.Seq[*corev1.Service] {
	return slices.Values(slices.DeleteFunc(slices.Clone(w.services), func(s *corev1.Service) bool { return s.Namespace != ns }))
}
func (w *world) ReplicationController(string, string) (*corev1.ReplicationController, bool) {
	return nil, false
}
func (w *world) StatefulSet(string, string) (*appsv1.StatefulSet, bool) { return nil, false }
func (w *world) CSINode(name string) (*storagev1.CSINode, bool)         { return find(w.csiNodes, "", name) }
func (w *world) CSIDriver(name string) (*storagev1.CSIDriver, bool) {
	return find(w.csiDrivers, "", name)
}
func (w *world) CSIStorageCapacities() iter.Seq[*storagev1.CSIStorageCapacity] {
	return slices.Values(w.capacities)
}
func (w *world) VolumeAttachments() iter.Seq[*storagev1.VolumeAttachment] {
	return slices.Values(w.attachments)
}
func (w *world) PodDisruptionBudgets() iter.Seq[*policyv1.PodDisruptionBudget] {
	return func(func(*policyv1.PodDisruptionBudget) bool) {}
}

func (w *world) ResourceClaim(ns, name string) (*resourcev1.ResourceClaim, bool) {
	return find(w.resourceClaims, ns, name)
}
func (w *world) ResourceClaims() iter.Seq[*resourcev1.ResourceClaim] {
	return slices.Values(w.resourceClaims)
}
func (w *world) DeviceClass(name string) (*resourcev1.DeviceClass, bool) {
	return find(w.deviceClasses, "", name)
}
func (w *world) DeviceClasses() iter.Seq[*resourcev1.DeviceClass] {
	return slices.Values(w.deviceClasses)
}
func (w *world) ResourceSlices() iter.Seq[*resourcev1.ResourceSlice] {
	return slices.Values(w.resourceSlices)
}
func (w *world) DeviceTaintRules() iter.Seq[*resourcev1.DeviceTaintRule] {
	return slices.Values(w.taintRules)
}

func drawWorld(t *rapid.T) *world {
	w := &world{
		namespaces: []*corev1.Namespace{
			{ObjectMeta: metav1.ObjectMeta{Name: "default"}},
			{ObjectMeta: metav1.ObjectMeta{Name: "other", Labels: map[string]string{"team": "blue"}}},
		},
	}
	for i := range rapid.IntRange(2, 8).Draw(t, "nodes") {
		w.nodes = append(w.nodes, drawNode(t, fmt.Sprintf("n%d", i)))
	}
	w.drawStorage(t)
	w.drawDrivers(t)
	for i := range rapid.IntRange(3, 20).Draw(t, "running") {
		p := w.drawPod(t, fmt.Sprintf("r%d", i))
		p.Spec.NodeName = w.nodes[rapid.IntRange(0, len(w.nodes)-1).Draw(t, "on")].Name
		if rapid.IntRange(0, 5).Draw(t, "leaving") == 0 {
			p.DeletionTimestamp = &metav1.Time{}
		}
		w.pods = append(w.pods, p)
	}
	p := w.drawPod(t, "p")
	p.Namespace = "default"
	w.drawDevices(t, p)
	w.pods = append(w.pods, p)
	if rapid.Bool().Draw(t, "service") {
		w.services = append(w.services, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "s"},
			Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "x"}},
		})
	}
	for _, app := range []string{"x", "y", "z"} {
		w.replicaSets = append(w.replicaSets, &appsv1.ReplicaSet{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: app},
			Spec:       appsv1.ReplicaSetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}},
		})
	}
	return w
}
