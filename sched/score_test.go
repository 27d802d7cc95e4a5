package sched

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

func mustCompile(t interface{ Fatal(...any) }, c Config) *compiled {
	out, err := c.compile()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// scoresOf runs one score for a pod over all nodes, in order of name.
func scoresOf(t *testing.T, pod *corev1.Pod, score func(*round, *candidate, []int32, []int64) bool, objects ...runtime.Object) []int64 {
	t.Helper()
	cfg := DefaultConfig()
	state := newState(append(objects, pod)...)
	cluster := Build(state)
	r := newRound(mustCompile(t, cfg), Input{State: state, Cluster: cluster})
	p, ok := cluster.pods.Get(podKey(pod.Namespace, pod.Name))
	if !ok {
		t.Fatal("no such pod")
	}
	c, s := r.prepare(p)
	if s != nil {
		t.Fatal(s.text(), s.err)
	}
	scores := make([]int64, len(cluster.order))
	if !score(r, c, cluster.order, scores) {
		return nil
	}
	return scores
}

func running(name, node string, pairs ...string) *corev1.Pod {
	p := simplePod(name, pairs...)
	p.Spec.NodeName = node
	return p
}

func labelled(p *corev1.Pod, key, value string) *corev1.Pod {
	p.Labels[key] = value
	return p
}

func zoned(name, zone string) *corev1.Node {
	n := makeNode(name)
	n.Labels[corev1.LabelTopologyZone] = zone
	return n
}

func TestScores(t *testing.T) {
	t.Parallel()
	tainted := makeNode("b")
	tainted.Spec.Taints = []corev1.Taint{{Key: "k", Effect: corev1.TaintEffectPreferNoSchedule}, {Key: "l", Effect: corev1.TaintEffectPreferNoSchedule}}
	slightly := makeNode("c")
	slightly.Spec.Taints = tainted.Spec.Taints[:1]

	withImage := makeNode("b")
	withImage.Status.Images = []corev1.ContainerImage{{Names: []string{"app:latest"}, SizeBytes: 1000 << 20}}
	imagePod := simplePod("p")
	imagePod.Spec.Containers[0].Image = "app"

	spread := func(p *corev1.Pod, key string) *corev1.Pod {
		p.Spec.TopologySpreadConstraints = append(p.Spec.TopologySpreadConstraints, corev1.TopologySpreadConstraint{
			MaxSkew: 1, TopologyKey: key, WhenUnsatisfiable: corev1.ScheduleAnyway,
			LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "x"}}})
		return p
	}
	near := func(p *corev1.Pod, weight int32, anti bool) *corev1.Pod {
		terms := []corev1.WeightedPodAffinityTerm{{Weight: weight, PodAffinityTerm: corev1.PodAffinityTerm{
			TopologyKey: corev1.LabelHostname, LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "x"}}}}}
		p.Spec.Affinity = &corev1.Affinity{PodAffinity: &corev1.PodAffinity{PreferredDuringSchedulingIgnoredDuringExecution: terms}}
		if anti {
			p.Spec.Affinity = &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{PreferredDuringSchedulingIgnoredDuringExecution: terms}}
		}
		return p
	}
	mustBeNear := func(p *corev1.Pod) *corev1.Pod {
		p.Spec.Affinity = &corev1.Affinity{PodAffinity: &corev1.PodAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{
			TopologyKey: corev1.LabelHostname, LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "x"}}}}}}
		return p
	}
	for _, tc := range []struct {
		name    string
		pod     *corev1.Pod
		score   func(*round, *candidate, []int32, []int64) bool
		objects []runtime.Object
		want    []int64 // by node name; nil: no say
	}{
		{"taints: fewer is better", simplePod("p"), (*round).scoreTaints, []runtime.Object{makeNode("a"), tainted, slightly}, []int64{100, 0, 50}},
		{"taints: none anywhere", simplePod("p"), (*round).scoreTaints, []runtime.Object{makeNode("a")}, nil},
		{"least allocated: half used", simplePod("p", "cpu", "1", "memory", "2Gi"), (*round).scoreFit,
			[]runtime.Object{makeNode("a"), makeNode("b"), running("r", "b", "cpu", "2", "memory", "4Gi")}, []int64{75, 25}},
		{"least allocated: pods without requests weigh too", simplePod("p"), (*round).scoreFit,
			[]runtime.Object{makeNode("a"), makeNode("b"), running("r", "b")}, []int64{97, 95}},
		{"balance: evens out what is lopsided", simplePod("p", "memory", "4Gi"), (*round).scoreBalance,
			[]runtime.Object{makeNode("a"), makeNode("b"), running("r", "b", "cpu", "2")}, []int64{62, 87}},
		{"balance: nothing requested", simplePod("p"), (*round).scoreBalance, []runtime.Object{makeNode("a")}, nil},
		{"images: present on one of two", imagePod, (*round).scoreImages, []runtime.Object{makeNode("a"), withImage}, []int64{0, 48}},
		{"images: unknown everywhere", simplePod("p"), (*round).scoreImages, []runtime.Object{makeNode("a")}, nil},
		{"spread over hosts", spread(simplePod("p"), corev1.LabelHostname), (*round).scoreSpread,
			[]runtime.Object{makeNode("a"), makeNode("b"), labelled(running("r", "b"), "app", "x")}, []int64{100, 0}},
		{"spread: pods being deleted do not count", spread(simplePod("p"), corev1.LabelHostname), (*round).scoreSpread,
			[]runtime.Object{makeNode("a"), makeNode("b"), deleting(labelled(running("r", "b"), "app", "x"))}, []int64{100, 100}},
		{"spread over zones: counts of the zone, nodes without one get nothing", spread(simplePod("p"), corev1.LabelTopologyZone), (*round).scoreSpread,
			[]runtime.Object{zoned("a", "1"), zoned("b", "1"), zoned("c", "2"), makeNode("d"), labelled(running("r", "b"), "app", "x"), labelled(running("s", "c"), "app", "x"), labelled(running("t", "c"), "app", "x")},
			[]int64{0, 100, 33, 100}}, // interleaved: d (no zone), a, c, b
		{"affinity preferred", near(simplePod("p"), 10, false), (*round).scoreAffinity,
			[]runtime.Object{makeNode("a"), makeNode("b"), labelled(running("r", "b"), "app", "x")}, []int64{0, 100}},
		{"anti-affinity preferred", near(simplePod("p"), 10, true), (*round).scoreAffinity,
			[]runtime.Object{makeNode("a"), makeNode("b"), labelled(running("r", "b"), "app", "x")}, []int64{100, 0}},
		{"preferred by one that runs", labelled(simplePod("p"), "app", "x"), (*round).scoreAffinity,
			[]runtime.Object{makeNode("a"), makeNode("b"), near(running("r", "a"), 5, true)}, []int64{0, 100}},
		{"required by one that runs", labelled(simplePod("p"), "app", "x"), (*round).scoreAffinity,
			[]runtime.Object{makeNode("a"), makeNode("b"), mustBeNear(running("r", "b"))}, []int64{0, 100}},
		{"affinity: nobody concerned", simplePod("p"), (*round).scoreAffinity, []runtime.Object{makeNode("a"), makeNode("b")}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			got := scoresOf(t, tc.pod, tc.score, tc.objects...)
			if len(got) != len(tc.want) {
				t.Fatalf("got %v; want %v", got, tc.want)
			}
			for i := range got {
				if got[i] != tc.want[i] {
					t.Fatalf("got %v; want %v", got, tc.want)
				}
			}
		})
	}
}

func deleting(p *corev1.Pod) *corev1.Pod {
	p.DeletionTimestamp = &metav1.Time{Time: epoch}
	return p
}

func TestNormalizedImage(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"app": "app:latest", "app:1": "app:1", "host:5000/app": "host:5000/app:latest",
		"host:5000/app:2": "host:5000/app:2", "app@sha256:00": "app@sha256:00",
	} {
		if got := normalizedImage(in); got != want {
			t.Errorf("normalizedImage(%q) = %q; want %q", in, got, want)
		}
	}
}

func TestConfigValidate(t *testing.T) {
	t.Parallel()
	if err := DefaultConfig().Validate(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
	of := func(edit func(*Profile)) func(*Config) { return func(c *Config) { edit(&c.Profiles[0]) } }
	spread := func(constraint corev1.TopologySpreadConstraint) func(*Config) {
		return of(func(p *Profile) { p.DefaultSpread = []corev1.TopologySpreadConstraint{constraint} })
	}
	for field, edit := range map[string]func(*Config){
		"Profiles":                               func(c *Config) { c.Profiles = nil },
		"Version":                                func(c *Config) { c.Version = nil },
		"FirstBackoff":                           func(c *Config) { c.FirstBackoff = 0 },
		"MaxPods":                                func(c *Config) { c.MaxPods = -1 },
		"MaxVictimSearches":                      func(c *Config) { c.MaxVictimSearches = -1 },
		"Profiles[1].SchedulerName":              func(c *Config) { c.Profiles = append(c.Profiles, DefaultProfile()) },
		"Profiles[0].SchedulerName":              of(func(p *Profile) { p.SchedulerName = "" }),
		"Profiles[0].Without":                    of(func(p *Profile) { p.Without = 1 << 31 }),
		"Profiles[0].Weights.ImageLocality":      of(func(p *Profile) { p.Weights.ImageLocality = -1 }),
		"Profiles[0].Fit.Strategy":               of(func(p *Profile) { p.Fit.Strategy = "" }),
		"Profiles[0].Fit.Resources[1].Weight":    of(func(p *Profile) { p.Fit.Resources[1].Weight = 0 }),
		"Profiles[0].Fit.Shape":                  of(func(p *Profile) { p.Fit.Shape = p.VolumeShape }),
		"Profiles[0].VolumeShape":                of(func(p *Profile) { p.VolumeShape = nil }),
		"Profiles[0].VolumeShape[1].Utilization": of(func(p *Profile) { p.VolumeShape[1].Utilization = 0 }),
		"Profiles[0].VolumeShape[0].Score":       of(func(p *Profile) { p.VolumeShape[0].Score = 101 }),
		"Profiles[0].AddedAffinity.RequiredDuringSchedulingIgnoredDuringExecution:": of(func(p *Profile) {
			p.AddedAffinity = &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
				NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "k", Operator: "Like"}}}}}}
		}),
		"Profiles[0].HardPodAffinityWeight":              of(func(p *Profile) { p.HardPodAffinityWeight = 101 }),
		"Profiles[0].PercentageOfNodesToScore":           of(func(p *Profile) { p.PercentageOfNodesToScore = 101 }),
		"Profiles[0].PreemptionCandidatesPercentage":     of(func(p *Profile) { p.PreemptionCandidatesPercentage = -1 }),
		"Profiles[0].PreemptionCandidatesMin":            of(func(p *Profile) { p.PreemptionCandidatesMin = -1 }),
		"Profiles[0].DefaultSpread[0].TopologyKey":       spread(corev1.TopologySpreadConstraint{MaxSkew: 1}),
		"Profiles[0].DefaultSpread[0].MaxSkew":           spread(corev1.TopologySpreadConstraint{TopologyKey: "k"}),
		"Profiles[0].DefaultSpread[0].WhenUnsatisfiable": spread(corev1.TopologySpreadConstraint{TopologyKey: "k", MaxSkew: 1}),
		"Profiles[0].DefaultSpread[0].LabelSelector":     spread(corev1.TopologySpreadConstraint{TopologyKey: "k", MaxSkew: 1, LabelSelector: &metav1.LabelSelector{}}),
	} {
		c := DefaultConfig()
		edit(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "Config."+strings.TrimSuffix(field, ":")) {
			t.Errorf("%s: %v", field, err)
		}
		if _, err := Schedule(c, Input{State: newState()}); err == nil {
			t.Errorf("%s: Schedule accepts it", field)
		}
	}
	if _, err := Schedule(DefaultConfig(), Input{}); err == nil {
		t.Error("Schedule accepts an Input without a view")
	}
}
