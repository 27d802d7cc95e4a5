package upstream

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"
)

// one reports true once in n draws or so. Drawn numbers tend to be small, and
// failing draws are shrunk towards 0, so 0 is false.
func one(t *rapid.T, n int, what string) bool { return rapid.IntRange(0, 4*n-1).Draw(t, what) >= 4*n-4 }

func quantities(t *rapid.T, amounts map[corev1.ResourceName][]string) corev1.ResourceList {
	l := corev1.ResourceList{}
	for _, name := range []corev1.ResourceName{"cpu", "memory", "pods", "ephemeral-storage", "example.com/gpu"} {
		if choices, ok := amounts[name]; ok {
			if q := rapid.SampledFrom(choices).Draw(t, string(name)); q != "" {
				l[name] = resource.MustParse(q)
			}
		}
	}
	return l
}

func drawNode(t *rapid.T, name string) *corev1.Node {
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}},
		Status: corev1.NodeStatus{Allocatable: quantities(t, map[corev1.ResourceName][]string{
			"cpu": {"16", "8", "4", "1"}, "memory": {"32Gi", "16Gi", "4Gi", ""}, "pods": {"20", "10", "3"}, "ephemeral-storage": {"10Gi", "10Gi", ""}, "example.com/gpu": {"1", "4", ""},
		})},
	}
	if one(t, 8, "nameless") {
		delete(n.Labels, corev1.LabelHostname)
	}
	if zone := rapid.SampledFrom([]string{"a", "b", "c", ""}).Draw(t, "zone"); zone != "" {
		n.Labels[corev1.LabelTopologyZone] = zone
	}
	n.Labels["disk"] = rapid.SampledFrom([]string{"ssd", "hdd"}).Draw(t, "disk")
	n.Spec.Unschedulable = one(t, 10, "unschedulable")
	for i := range max(0, rapid.IntRange(-2, 2).Draw(t, "taints")) {
		n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: fmt.Sprintf("t%d", i), Value: rapid.SampledFrom([]string{"", "v"}).Draw(t, "value"),
			Effect: rapid.SampledFrom([]corev1.TaintEffect{"PreferNoSchedule", "PreferNoSchedule", "NoSchedule", "NoExecute"}).Draw(t, "effect")})
	}
	if one(t, 2, "images") {
		n.Status.Images = []corev1.ContainerImage{{Names: []string{"app:latest", "app@sha256:1"}, SizeBytes: 500 << 20}}
	}
	if one(t, 3, "features") {
		n.Status.DeclaredFeatures = []string{"UserNamespacesHostNetworkSupport"}
	}
	return n
}

func (w *world) drawPod(t *rapid.T, name string) *corev1.Pod {
	app := rapid.SampledFrom([]string{"x", "y", "z"}).Draw(t, "app")
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: rapid.SampledFrom([]string{"default", "default", "other"}).Draw(t, "namespace"),
			Name:      name, UID: types.UID(name), Labels: map[string]string{"app": app, "rev": rapid.SampledFrom([]string{"1", "2"}).Draw(t, "rev")},
		},
		Spec: corev1.PodSpec{SchedulerName: corev1.DefaultSchedulerName},
	}
	if one(t, 2, "owned") {
		yes := true
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: app, Controller: &yes}}
	}
	for range rapid.IntRange(1, 2).Draw(t, "containers") {
		p.Spec.Containers = append(p.Spec.Containers, drawContainer(t))
	}
	if one(t, 3, "init") {
		c := drawContainer(t)
		if one(t, 2, "sidecar") {
			always := corev1.ContainerRestartPolicyAlways
			c.RestartPolicy = &always
		}
		p.Spec.InitContainers = append(p.Spec.InitContainers, c)
	}
	if one(t, 6, "overhead") {
		p.Spec.Overhead = corev1.ResourceList{"cpu": resource.MustParse("100m")}
	}
	if one(t, 6, "pod-level") {
		p.Spec.Resources = &corev1.ResourceRequirements{Requests: corev1.ResourceList{"cpu": resource.MustParse("1")}}
	}
	if one(t, 12, "host users") {
		no := false
		p.Spec.HostUsers, p.Spec.HostNetwork = &no, true
	}
	drawTolerations(t, p)
	drawSelection(t, p)
	drawSpread(t, p)
	drawAffinity(t, p)
	if one(t, 4, "claims") {
		claim := rapid.SampledFrom(append(w.claimNames(), "absent")).Draw(t, "claim")
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim}}})
	}
	if one(t, 8, "disk") {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "d", VolumeSource: corev1.VolumeSource{
			ISCSI: &corev1.ISCSIVolumeSource{IQN: "iqn", ReadOnly: one(t, 2, "read-only")}}})
	}
	return p
}

func drawContainer(t *rapid.T) corev1.Container {
	c := corev1.Container{Image: rapid.SampledFrom([]string{"app", "app:latest", "none"}).Draw(t, "image")}
	c.Resources.Requests = quantities(t, map[corev1.ResourceName][]string{
		"cpu": {"", "0", "100m", "500m", "1", "3"}, "memory": {"", "100Mi", "1Gi", "2Gi"},
		"ephemeral-storage": {"", "", "", "1Gi"}, "example.com/gpu": {"", "", "", "", "0", "1"},
	})
	if one(t, 6, "port") {
		c.Ports = []corev1.ContainerPort{{HostPort: int32(rapid.IntRange(80, 81).Draw(t, "number")),
			HostIP: rapid.SampledFrom([]string{"", "0.0.0.0", "127.0.0.1", "10.0.0.1"}).Draw(t, "ip")}}
	}
	return c
}

func drawTolerations(t *rapid.T, p *corev1.Pod) {
	for i := range 2 {
		if one(t, 2, "tolerant") {
			p.Spec.Tolerations = append(p.Spec.Tolerations, corev1.Toleration{Key: fmt.Sprintf("t%d", i),
				Operator: rapid.SampledFrom([]corev1.TolerationOperator{"Exists", "Equal", ""}).Draw(t, "operator"),
				Effect:   rapid.SampledFrom([]corev1.TaintEffect{"", "NoSchedule", "PreferNoSchedule"}).Draw(t, "tolerated")})
		}
	}
	if one(t, 4, "tolerates drain") {
		p.Spec.Tolerations = append(p.Spec.Tolerations, corev1.Toleration{Key: corev1.TaintNodeUnschedulable, Operator: "Exists"})
	}
}

func drawSelection(t *rapid.T, p *corev1.Pod) {
	if one(t, 5, "selector") {
		p.Spec.NodeSelector = map[string]string{"disk": "ssd"}
	}
	zone := corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: corev1.LabelTopologyZone,
		Operator: rapid.SampledFrom([]corev1.NodeSelectorOperator{"In", "NotIn"}).Draw(t, "zones"), Values: []string{"a"}}}}
	disk := corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "disk", Operator: "In", Values: []string{"hdd"}}}}
	a := &corev1.NodeAffinity{}
	if one(t, 5, "required") {
		a.RequiredDuringSchedulingIgnoredDuringExecution = &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{zone, disk}}
	}
	if one(t, 3, "preferred") {
		a.PreferredDuringSchedulingIgnoredDuringExecution = []corev1.PreferredSchedulingTerm{{Weight: 7, Preference: zone}, {Weight: 3, Preference: disk}}
	}
	p.Spec.Affinity = &corev1.Affinity{NodeAffinity: a}
}

func drawKey(t *rapid.T) string {
	return rapid.SampledFrom([]string{corev1.LabelTopologyZone, corev1.LabelHostname, "disk"}).Draw(t, "key")
}

func drawSelector(t *rapid.T) *metav1.LabelSelector {
	switch rapid.IntRange(0, 9).Draw(t, "selector kind") {
	case 0:
		return nil
	case 1:
		return &metav1.LabelSelector{}
	}
	return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app",
		Operator: rapid.SampledFrom([]metav1.LabelSelectorOperator{"In", "In", "NotIn"}).Draw(t, "op"),
		Values:   []string{rapid.SampledFrom([]string{"x", "y", "z"}).Draw(t, "selects")}}}}
}

func drawSpread(t *rapid.T, p *corev1.Pod) {
	for range max(0, rapid.IntRange(-2, 2).Draw(t, "spreads")) {
		c := corev1.TopologySpreadConstraint{
			MaxSkew: int32(rapid.IntRange(1, 3).Draw(t, "skew")), TopologyKey: drawKey(t), LabelSelector: drawSelector(t),
			WhenUnsatisfiable: rapid.SampledFrom([]corev1.UnsatisfiableConstraintAction{"DoNotSchedule", "ScheduleAnyway"}).Draw(t, "action"),
		}
		if one(t, 3, "min domains") {
			n := int32(rapid.IntRange(1, 4).Draw(t, "minDomains"))
			c.MinDomains = &n
		}
		policies := []corev1.NodeInclusionPolicy{"", "Honor", "Ignore"}
		if policy := rapid.SampledFrom(policies).Draw(t, "affinityPolicy"); policy != "" {
			c.NodeAffinityPolicy = &policy
		}
		if policy := rapid.SampledFrom(policies).Draw(t, "taintsPolicy"); policy != "" {
			c.NodeTaintsPolicy = &policy
		}
		if c.LabelSelector != nil && one(t, 3, "label keys") {
			c.MatchLabelKeys = []string{"rev", "unknown"}
		}
		p.Spec.TopologySpreadConstraints = append(p.Spec.TopologySpreadConstraints, c)
	}
}

func drawTerm(t *rapid.T) corev1.PodAffinityTerm {
	term := corev1.PodAffinityTerm{TopologyKey: drawKey(t), LabelSelector: drawSelector(t)}
	switch rapid.IntRange(0, 6).Draw(t, "whose") {
	case 0:
		term.Namespaces = []string{"other"}
	case 1:
		term.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": "blue"}}
	case 2:
		term.NamespaceSelector = &metav1.LabelSelector{}
	}
	return term
}

func drawAffinity(t *rapid.T, p *corev1.Pod) {
	terms := func() (required []corev1.PodAffinityTerm, preferred []corev1.WeightedPodAffinityTerm) {
		for range rapid.IntRange(0, 2).Draw(t, "required terms") {
			required = append(required, drawTerm(t))
		}
		for range rapid.IntRange(0, 2).Draw(t, "preferred terms") {
			preferred = append(preferred, corev1.WeightedPodAffinityTerm{Weight: int32(rapid.IntRange(1, 100).Draw(t, "weight")), PodAffinityTerm: drawTerm(t)})
		}
		return required, preferred
	}
	if one(t, 4, "affine") {
		a := &corev1.PodAffinity{}
		a.RequiredDuringSchedulingIgnoredDuringExecution, a.PreferredDuringSchedulingIgnoredDuringExecution = terms()
		p.Spec.Affinity.PodAffinity = a
	}
	if one(t, 4, "averse") {
		a := &corev1.PodAntiAffinity{}
		a.RequiredDuringSchedulingIgnoredDuringExecution, a.PreferredDuringSchedulingIgnoredDuringExecution = terms()
		p.Spec.Affinity.PodAntiAffinity = a
	}
}

func (w *world) claimNames() (names []string) {
	for _, c := range w.claims {
		names = append(names, c.Name)
	}
	return names
}

// drawStorage makes claims of every sort: bound, lost, immediate, delayed.
func (w *world) drawStorage(t *rapid.T) {
	now, wait := storagev1.VolumeBindingImmediate, storagev1.VolumeBindingWaitForFirstConsumer
	w.classes = []*storagev1.StorageClass{
		{ObjectMeta: metav1.ObjectMeta{Name: "now"}, Provisioner: "d", VolumeBindingMode: &now},
		{ObjectMeta: metav1.ObjectMeta{Name: "static"}, Provisioner: "kubernetes.io/no-provisioner", VolumeBindingMode: &wait},
		{ObjectMeta: metav1.ObjectMeta{Name: "lazy"}, Provisioner: "d", VolumeBindingMode: &wait,
			AllowedTopologies: []corev1.TopologySelectorTerm{{MatchLabelExpressions: []corev1.TopologySelectorLabelRequirement{{Key: "disk", Values: []string{"ssd"}}}}}},
	}
	volume := func(name, class string, edit func(*corev1.PersistentVolume)) {
		pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}}, Spec: corev1.PersistentVolumeSpec{
			StorageClassName: class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Capacity:     corev1.ResourceList{"storage": resource.MustParse("5Gi")},
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{}}}}},
			Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeAvailable}}
		pv.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions = []corev1.NodeSelectorRequirement{
			{Key: "disk", Operator: "In", Values: []string{rapid.SampledFrom([]string{"ssd", "hdd"}).Draw(t, "volume on")}}}
		edit(pv)
		w.volumes = append(w.volumes, pv)
	}
	volume("bound", "now", func(pv *corev1.PersistentVolume) {
		pv.Spec.CSI = &corev1.CSIPersistentVolumeSource{Driver: "d", VolumeHandle: "b"}
	})
	volume("zoned", "now", func(pv *corev1.PersistentVolume) {
		pv.Labels[corev1.LabelTopologyZone] = "a__b"
		pv.Spec.NodeAffinity = nil
	})
	volume("free", "static", func(*corev1.PersistentVolume) {})
	volume("roomy", "static", func(pv *corev1.PersistentVolume) { pv.Spec.Capacity["storage"] = resource.MustParse("20Gi") })
	claim := func(name, class, volume string, edit func(*corev1.PersistentVolumeClaim)) {
		c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(name), Annotations: map[string]string{}},
			Spec: corev1.PersistentVolumeClaimSpec{StorageClassName: &class, VolumeName: volume, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
				Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{"storage": resource.MustParse("1Gi")}}}}
		if volume != "" {
			c.Annotations["pv.kubernetes.io/bind-completed"] = "yes"
			c.Status.Phase = corev1.ClaimBound
		}
		edit(c)
		w.claims = append(w.claims, c)
	}
	keep := func(*corev1.PersistentVolumeClaim) {}
	claim("bound", "now", "bound", keep)
	claim("zoned", "now", "zoned", keep)
	claim("pending", "now", "", keep)
	claim("static", "static", "", keep)
	claim("lazy", "lazy", "", keep)
	claim("selected", "lazy", "", func(c *corev1.PersistentVolumeClaim) { c.Annotations["volume.kubernetes.io/selected-node"] = "n0" })
	claim("once", "now", "bound", func(c *corev1.PersistentVolumeClaim) {
		c.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOncePod}
	})
	claim("lost", "now", "gone", func(c *corev1.PersistentVolumeClaim) { c.Status.Phase = corev1.ClaimLost })
	claim("leaving", "now", "bound", func(c *corev1.PersistentVolumeClaim) { c.DeletionTimestamp = &metav1.Time{} })
}

// drawDrivers draws what is known of the CSI driver of the claims: whether pods need it on
// their node, its limits there, what is attached, and how much room it has.
func (w *world) drawDrivers(t *rapid.T) {
	yes, no := true, false
	if rapid.Bool().Draw(t, "driver") {
		w.csiDrivers = []*storagev1.CSIDriver{{ObjectMeta: metav1.ObjectMeta{Name: "d"}, Spec: storagev1.CSIDriverSpec{
			PreventPodSchedulingIfMissing: rapid.SampledFrom([]*bool{nil, &yes, &no}).Draw(t, "needed"),
			StorageCapacity:               rapid.SampledFrom([]*bool{nil, &yes, &no}).Draw(t, "capacity")}}}
	}
	for i, n := range w.nodes {
		if one(t, 3, "no CSINode") {
			continue
		}
		c := &storagev1.CSINode{ObjectMeta: metav1.ObjectMeta{Name: n.Name}}
		if !one(t, 3, "not installed") {
			d := storagev1.CSINodeDriver{Name: "d", NodeID: n.Name}
			if rapid.Bool().Draw(t, "limited") {
				count := rapid.Int32Range(0, 3).Draw(t, "limit")
				d.Allocatable = &storagev1.VolumeNodeResources{Count: &count}
			}
			c.Spec.Drivers = append(c.Spec.Drivers, d)
		}
		w.csiNodes = append(w.csiNodes, c)
		if one(t, 3, "attached") {
			name := rapid.SampledFrom([]string{"bound", "zoned", "gone"}).Draw(t, "volume")
			w.attachments = append(w.attachments, &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("a", i)}, Spec: storagev1.VolumeAttachmentSpec{
				Attacher: "d", NodeName: n.Name, Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &name}}})
		}
		if rapid.Bool().Draw(t, "room") {
			size := resource.MustParse(rapid.SampledFrom([]string{"0", "1Gi", "5Gi"}).Draw(t, "size"))
			w.capacities = append(w.capacities, &storagev1.CSIStorageCapacity{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: n.Name}, StorageClassName: "lazy", Capacity: &size,
				NodeTopology: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelHostname: n.Name}}})
		}
	}
}
