package sched

import (
	"maps"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

func TestPortsConflict(t *testing.T) {
	t.Parallel()
	port := func(ip string, protocol corev1.Protocol, n int32) corev1.ContainerPort {
		return corev1.ContainerPort{HostIP: ip, Protocol: protocol, HostPort: n}
	}
	for _, tc := range []struct {
		name     string
		has, ask corev1.ContainerPort
		free     bool
	}{
		{"same", port("", "", 80), port("", "TCP", 80), false},
		{"another port", port("", "", 80), port("", "", 81), true},
		{"another protocol", port("", "TCP", 80), port("", "UDP", 80), true},
		{"another address", port("127.0.0.1", "", 80), port("10.0.0.1", "", 80), true},
		{"any address against one", port("", "", 80), port("10.0.0.1", "", 80), false},
		{"one address against any", port("10.0.0.1", "", 80), port("0.0.0.0", "", 80), false},
		{"no host port", port("", "", 0), port("", "", 0), true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			make := func(p corev1.ContainerPort) *podInfo {
				return makePodInfo(&corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Ports: []corev1.ContainerPort{p}}}}})
			}
			n := &nodeInfo{}
			n.add(make(tc.has))
			if got := n.portsFree(make(tc.ask)); got != tc.free {
				t.Errorf("free = %v", got)
			}
		})
	}
	t.Run("ports of sidecars count, those of other init containers do not", func(t *testing.T) {
		t.Parallel()
		side, init := sidecar(), container()
		side.Ports = []corev1.ContainerPort{port("", "", 1)}
		init.Ports = []corev1.ContainerPort{port("", "", 2)}
		p := makePodInfo(&corev1.Pod{Spec: corev1.PodSpec{InitContainers: []corev1.Container{side, init}}})
		if len(p.ports) != 1 || p.ports[0].port != 1 {
			t.Errorf("ports %v", p.ports)
		}
	})
}

func TestToleratesTaints(t *testing.T) {
	t.Parallel()
	taint := func(s string) corev1.Taint {
		kv, effect, _ := strings.Cut(s, ":")
		k, v, _ := strings.Cut(kv, "=")
		return corev1.Taint{Key: k, Value: v, Effect: corev1.TaintEffect(effect)}
	}
	for _, tc := range []struct {
		name        string
		taints      []string
		tolerations []corev1.Toleration
		want        bool
	}{
		{"no taints", nil, nil, true},
		{"NoSchedule", []string{"a=1:NoSchedule"}, nil, false},
		{"NoExecute", []string{"a=1:NoExecute"}, nil, false},
		{"PreferNoSchedule is only a preference", []string{"a=1:PreferNoSchedule"}, nil, true},
		{"equal value", []string{"a=1:NoSchedule"}, []corev1.Toleration{{Key: "a", Value: "1"}}, true},
		{"another value", []string{"a=1:NoSchedule"}, []corev1.Toleration{{Key: "a", Value: "2"}}, false},
		{"exists", []string{"a=1:NoSchedule"}, []corev1.Toleration{{Key: "a", Operator: corev1.TolerationOpExists}}, true},
		{"another effect", []string{"a=1:NoSchedule"}, []corev1.Toleration{{Key: "a", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute}}, false},
		{"everything", []string{"a=1:NoSchedule", "b=2:NoExecute"}, []corev1.Toleration{{Operator: corev1.TolerationOpExists}}, true},
		{"one of two", []string{"a=1:NoSchedule", "b=2:NoExecute"}, []corev1.Toleration{{Key: "a", Operator: corev1.TolerationOpExists}}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var taints []corev1.Taint
			for _, s := range tc.taints {
				taints = append(taints, taint(s))
			}
			if got := toleratesTaints(tc.tolerations, taints); got != tc.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestNamedNodes(t *testing.T) {
	t.Parallel()
	field := func(op corev1.NodeSelectorOperator, names ...string) corev1.NodeSelectorRequirement {
		return corev1.NodeSelectorRequirement{Key: metav1.ObjectNameField, Operator: op, Values: names}
	}
	for _, tc := range []struct {
		name     string
		terms    [][]corev1.NodeSelectorRequirement
		want     []string // nil: any node
		conflict bool
	}{
		{name: "no terms"},
		{name: "one name", terms: [][]corev1.NodeSelectorRequirement{{field("In", "a")}}, want: []string{"a"}},
		{name: "terms add up", terms: [][]corev1.NodeSelectorRequirement{{field("In", "a")}, {field("In", "b")}}, want: []string{"a", "b"}},
		{name: "requirements intersect", terms: [][]corev1.NodeSelectorRequirement{{field("In", "a", "b"), field("In", "b", "c")}}, want: []string{"b"}},
		{name: "a term without names allows any", terms: [][]corev1.NodeSelectorRequirement{{field("In", "a")}, {}}},
		{name: "NotIn names none", terms: [][]corev1.NodeSelectorRequirement{{field("NotIn", "a")}}},
		{name: "conflict", terms: [][]corev1.NodeSelectorRequirement{{field("In", "a"), field("In", "b")}}, conflict: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			ns := &corev1.NodeSelector{}
			for _, fields := range tc.terms {
				ns.NodeSelectorTerms = append(ns.NodeSelectorTerms, corev1.NodeSelectorTerm{MatchFields: fields})
			}
			names, conflict := namedNodes(ns)
			if conflict != tc.conflict || (!conflict && !slices.Equal(slices.Sorted(maps.Keys(names)), tc.want)) {
				t.Errorf("got %v, %v", names, conflict)
			}
		})
	}
}

func TestNodesToFind(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ percentage, all, want int }{
		{0, 1, 1}, {0, 99, 99}, {0, 100, 100}, {0, 250, 120}, {0, 1000, 420}, {0, 5000, 500}, {0, 50000, 2500},
		{100, 5000, 5000}, {1, 5000, 100}, {50, 1000, 500},
	} {
		if got := nodesToFind(tc.percentage, tc.all); got != tc.want {
			t.Errorf("nodesToFind(%d, %d) = %d; want %d", tc.percentage, tc.all, got, tc.want)
		}
	}
}

func TestZonesMatch(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		volume map[string]string
		node   map[string]string
		want   bool
	}{
		{"volume without zone", nil, map[string]string{corev1.LabelTopologyZone: "a"}, true},
		{"node without zone", map[string]string{corev1.LabelTopologyZone: "a"}, nil, true},
		{"same zone", map[string]string{corev1.LabelTopologyZone: "a"}, map[string]string{corev1.LabelTopologyZone: "a"}, true},
		{"another zone", map[string]string{corev1.LabelTopologyZone: "a"}, map[string]string{corev1.LabelTopologyZone: "b"}, false},
		{"one of several zones", map[string]string{corev1.LabelTopologyZone: "a__b"}, map[string]string{corev1.LabelTopologyZone: "b"}, true},
		{"old label on the volume", map[string]string{corev1.LabelFailureDomainBetaZone: "a"}, map[string]string{corev1.LabelTopologyZone: "a"}, true},
		{"region missing on the node", map[string]string{corev1.LabelTopologyRegion: "r"}, map[string]string{corev1.LabelTopologyZone: "a"}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			zones := zoneLabels(&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Labels: tc.volume}})
			if got := zonesMatch(zones, tc.node); got != tc.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestSameDisk(t *testing.T) {
	t.Parallel()
	gce := func(name string, readOnly bool) corev1.Volume {
		return corev1.Volume{VolumeSource: corev1.VolumeSource{GCEPersistentDisk: &corev1.GCEPersistentDiskVolumeSource{PDName: name, ReadOnly: readOnly}}}
	}
	rbd := func(readOnly bool, monitors ...string) corev1.Volume {
		return corev1.Volume{VolumeSource: corev1.VolumeSource{RBD: &corev1.RBDVolumeSource{CephMonitors: monitors, RBDPool: "p", RBDImage: "i", ReadOnly: readOnly}}}
	}
	aws := corev1.Volume{VolumeSource: corev1.VolumeSource{AWSElasticBlockStore: &corev1.AWSElasticBlockStoreVolumeSource{VolumeID: "v", ReadOnly: true}}}
	iscsi := corev1.Volume{VolumeSource: corev1.VolumeSource{ISCSI: &corev1.ISCSIVolumeSource{IQN: "q"}}}
	for _, tc := range []struct {
		name string
		a, b corev1.Volume
		want bool
	}{
		{"two writers", gce("d", false), gce("d", false), true},
		{"two readers", gce("d", true), gce("d", true), false},
		{"another disk", gce("d", false), gce("e", false), false},
		{"EBS not even for readers", aws, aws, true},
		{"iSCSI", iscsi, iscsi, true},
		{"RBD of one cluster", rbd(false, "m1", "m2"), rbd(true, "m2"), true},
		{"RBD of two clusters", rbd(false, "m1"), rbd(false, "m2"), false},
		{"different kinds", gce("d", false), iscsi, false},
	} {
		if got := sameDisk(&tc.a, &tc.b); got != tc.want {
			t.Errorf("%s: got %v", tc.name, got)
		}
	}
}

// TestVolumeLimits attaches volumes of a driver that allows two on a node.
func TestVolumeLimits(t *testing.T) {
	t.Parallel()
	two := int32(2)
	objects := []runtime.Object{
		makeNode("n"),
		&storagev1.CSINode{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Spec: storagev1.CSINodeSpec{Drivers: []storagev1.CSINodeDriver{
			{Name: "d", Allocatable: &storagev1.VolumeNodeResources{Count: &two}}}}},
	}
	for _, name := range []string{"1", "2", "3"} {
		objects = append(objects, boundClaim(name, nil), &corev1.PersistentVolume{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: corev1.PersistentVolumeSource{
				CSI: &corev1.CSIPersistentVolumeSource{Driver: "d", VolumeHandle: name}}},
		})
	}
	for _, tc := range []struct {
		name          string
		running, asks []string
		want          string
	}{
		{"below the limit", []string{"1"}, []string{"2"}, ""},
		{"above the limit", []string{"1", "2"}, []string{"3"}, "node(s) exceed max volume count"},
		{"shared with one that runs", []string{"1", "2"}, []string{"2"}, ""},
		{"two at once", []string{"1"}, []string{"2", "3"}, "node(s) exceed max volume count"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			running, asks := claimPod("running", tc.running...), claimPod("asks", tc.asks...)
			running.Spec.NodeName = "n"
			plan := mustSchedule(t, append(slices.Clone(objects), running, asks)...)
			checkFailure(t, plan, tc.want)
		})
	}
}

// TestUnusableClaims checks what is said of claims that keep a pod off all nodes.
func TestUnusableClaims(t *testing.T) {
	t.Parallel()
	lost := boundClaim("c", func(c *corev1.PersistentVolumeClaim) { c.Status.Phase = corev1.ClaimLost })
	leaving := boundClaim("c", func(c *corev1.PersistentVolumeClaim) { c.DeletionTimestamp = &metav1.Time{Time: epoch} })
	noClass := boundClaim("c", func(c *corev1.PersistentVolumeClaim) {
		class := "gone"
		c.Annotations, c.Spec.VolumeName, c.Spec.StorageClassName = nil, "", &class
	})
	for _, tc := range []struct {
		name    string
		objects []runtime.Object
		want    string
	}{
		{"absent", nil, `0/1 nodes are available: persistentvolumeclaim "c" not found.`},
		{"lost", []runtime.Object{lost}, `persistentvolumeclaim "c" bound to non-existent persistentvolume "c"`},
		{"being deleted", []runtime.Object{leaving}, `persistentvolumeclaim "c" is being deleted`},
		{"volume gone", []runtime.Object{boundClaim("c", nil)}, "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)"},
		{"class gone", []runtime.Object{noClass}, `storageclass.storage.k8s.io "gone" not found`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			plan := mustSchedule(t, append([]runtime.Object{makeNode("n"), claimPod("p", "c")}, tc.objects...)...)
			checkFailure(t, plan, tc.want)
		})
	}
}

// TestStorageCapacity asks a provisioner that says how much it has where.
func TestStorageCapacity(t *testing.T) {
	t.Parallel()
	yes, class, mode := true, "lazy", storagev1.VolumeBindingWaitForFirstConsumer
	capacity := resource.MustParse("5Gi")
	objects := []runtime.Object{
		makeNode("big"), makeNode("none"),
		&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: class}, Provisioner: "d", VolumeBindingMode: &mode},
		&storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: "d"}, Spec: storagev1.CSIDriverSpec{StorageCapacity: &yes}},
		&storagev1.CSIStorageCapacity{ObjectMeta: metav1.ObjectMeta{Name: "x"}, StorageClassName: class, Capacity: &capacity,
			NodeTopology: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelHostname: "big"}}},
		claimPod("p", "c"),
	}
	claim := func(size string) *corev1.PersistentVolumeClaim {
		return boundClaim("c", func(c *corev1.PersistentVolumeClaim) {
			c.Annotations, c.Spec.VolumeName, c.Spec.StorageClassName = nil, "", &class
			c.Spec.Resources.Requests = requests("storage", size)
		})
	}
	plan := mustSchedule(t, append(slices.Clone(objects), claim("5Gi"))...)
	if len(plan.Waiting) != 1 || plan.Waiting[0].Node != "big" || len(plan.Waiting[0].Claims) != 1 {
		t.Errorf("5Gi: %s", describePlan(plan))
	}
	checkFailure(t, mustSchedule(t, append(slices.Clone(objects), claim("6Gi"))...), "2 node(s) did not have enough free storage")
}

func boundClaim(name string, edit func(*corev1.PersistentVolumeClaim)) *corev1.PersistentVolumeClaim {
	c := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Annotations: map[string]string{"pv.kubernetes.io/bind-completed": "yes"}},
		Spec:       corev1.PersistentVolumeClaimSpec{VolumeName: name},
		Status:     corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound},
	}
	if edit != nil {
		edit(c)
	}
	return c
}

func claimPod(name string, claims ...string) *corev1.Pod {
	p := simplePod(name)
	for _, c := range claims {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: c, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: c}}})
	}
	return p
}

func simplePod(name string, pairs ...string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{}},
		Spec:       corev1.PodSpec{SchedulerName: corev1.DefaultSchedulerName, Containers: []corev1.Container{container(pairs...)}},
	}
}

func mustSchedule(t *testing.T, objects ...runtime.Object) Plan {
	t.Helper()
	plan, err := Schedule(DefaultConfig(), Input{Now: epoch, State: newState(objects...)})
	if err != nil {
		t.Fatal(err)
	}
	return plan
}

// checkFailure wants the only failure to contain text; empty: none.
func checkFailure(t *testing.T, plan Plan, text string) {
	t.Helper()
	switch {
	case text == "" && len(plan.Failures) == 0:
	case text != "" && len(plan.Failures) == 1 && strings.Contains(plan.Failures[0].Message, text):
	default:
		t.Errorf("want failure %q; got\n%s", text, describePlan(plan))
	}
}
