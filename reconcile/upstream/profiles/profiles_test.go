package profiles_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"timonel/reconcile/upstream/profiles"
	"timonel/sched"
)

const head = "apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\n"

// A file that says nothing is what sched does anyway.
func TestNothingSaidIsTheDefault(t *testing.T) {
	t.Parallel()
	got, err := profiles.Parse([]byte(head))
	require.NoError(t, err)
	require.Equal(t, sched.DefaultConfig(), got)
}

func TestWhatIsSaidIsCarriedOver(t *testing.T) {
	t.Parallel()
	got, err := profiles.Parse([]byte(head + `
parallelism: 4
percentageOfNodesToScore: 30
podInitialBackoffSeconds: 2
podMaxBackoffSeconds: 20
leaderElection: {leaderElect: true}
profiles:
- schedulerName: packed
  percentageOfNodesToScore: 40
  plugins:
    multiPoint:
      disabled: [{name: NodePorts}, {name: GangScheduling}]
    score:
      disabled: [{name: ImageLocality}]
      enabled: [{name: InterPodAffinity, weight: 7}, {name: NodeAffinity}]
    filter:
      disabled: [{name: PodTopologySpread}]
    postFilter:
      disabled: [{name: "*"}]
  pluginConfig:
  - name: NodeResourcesFit
    args:
      ignoredResources: [example.com/foo]
      ignoredResourceGroups: [example.net]
      scoringStrategy:
        type: RequestedToCapacityRatio
        resources: [{name: memory, weight: 3}, {name: example.com/gpu}]
        requestedToCapacityRatio: {shape: [{utilization: 0, score: 1}, {utilization: 80, score: 10}]}
  - name: NodeResourcesBalancedAllocation
    args: {resources: [{name: cpu}, {name: ephemeral-storage}]}
  - name: PodTopologySpread
    args:
      defaultingType: List
      defaultConstraints: [{maxSkew: 2, topologyKey: rack, whenUnsatisfiable: DoNotSchedule}]
  - name: InterPodAffinity
    args: {hardPodAffinityWeight: 9, ignorePreferredTermsOfExistingPods: true}
  - name: NodeAffinity
    args:
      addedAffinity:
        requiredDuringSchedulingIgnoredDuringExecution:
          nodeSelectorTerms: [{matchExpressions: [{key: disk, operator: Exists}]}]
  - name: DefaultPreemption
    args: {minCandidateNodesPercentage: 5, minCandidateNodesAbsolute: 50}
  - name: VolumeBinding
    args: {shape: [{utilization: 0, score: 0}, {utilization: 100, score: 10}]}
  - name: DynamicResources
    args: {bindingTimeout: 30s}
- schedulerName: spread
  pluginConfig:
  - name: PodTopologySpread
    args: {defaultingType: List}
`))
	require.NoError(t, err)
	packed, spread := sched.DefaultProfile(), sched.DefaultProfile()
	packed.SchedulerName, packed.PercentageOfNodesToScore, packed.DisablePreemption = "packed", 40, true
	packed.Without = sched.FilterNodePorts | sched.FilterPodTopologySpread
	packed.Weights.ImageLocality, packed.Weights.PodAffinity, packed.Weights.NodeAffinity = 0, 7, 1
	packed.IgnoredResources, packed.IgnoredResourceGroups = []string{"example.com/foo"}, []string{"example.net"}
	packed.Fit = sched.FitScore{Strategy: sched.RequestedToCapacityRatio,
		Resources: []sched.WeightedResource{{Name: "memory", Weight: 3}, {Name: "example.com/gpu", Weight: 1}},
		Shape:     []sched.UtilizationPoint{{Utilization: 0, Score: 10}, {Utilization: 80, Score: 100}}}
	packed.Balanced = []corev1.ResourceName{"cpu", "ephemeral-storage"}
	packed.DefaultSpread = []corev1.TopologySpreadConstraint{{MaxSkew: 2, TopologyKey: "rack", WhenUnsatisfiable: corev1.DoNotSchedule}}
	packed.HardPodAffinityWeight, packed.IgnorePreferredTermsOfExistingPods = 9, true
	packed.AddedAffinity = &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
		NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "disk", Operator: corev1.NodeSelectorOpExists}}}}}}
	packed.PreemptionCandidatesPercentage, packed.PreemptionCandidatesMin = 5, 50
	packed.VolumeShape = []sched.UtilizationPoint{{Utilization: 0, Score: 0}, {Utilization: 100, Score: 100}}
	packed.DeviceBindingTimeout = 30 * time.Second
	spread.SchedulerName, spread.PercentageOfNodesToScore = "spread", 30
	spread.DefaultSpread = []corev1.TopologySpreadConstraint{}
	want := sched.DefaultConfig()
	want.FirstBackoff, want.LastBackoff = 2*time.Second, 20*time.Second
	want.Profiles = []sched.Profile{packed, spread}
	require.Equal(t, want, got)
}

// What is wrong, and what is not done here, is refused by its path.
func TestWhatIsRefused(t *testing.T) {
	t.Parallel()
	profile := func(text string) string {
		return head + "profiles:\n- schedulerName: mine\n  " + strings.ReplaceAll(text, "\n", "\n  ")
	}
	for name, tc := range map[string]struct{ file, want string }{
		"another kind":     {"apiVersion: kubescheduler.config.k8s.io/v1\nkind: NodeAffinityArgs\n", "KubeSchedulerConfiguration"},
		"another version":  {"apiVersion: kubescheduler.config.k8s.io/v1beta3\nkind: KubeSchedulerConfiguration\n", "v1beta3"},
		"not YAML":         {"{", "parse error"},
		"unknown field":    {head + "profile: []\n", `unknown field "profile"`},
		"unknown argument": {profile("pluginConfig: [{name: NodeAffinity, args: {added: {}}}]"), `unknown field "added"`},
		"two of one name":  {head + "profiles: [{schedulerName: a}, {schedulerName: a}]\n", "profiles[1].schedulerName: Duplicate value"},
		"share":            {head + "percentageOfNodesToScore: 101\n", "percentageOfNodesToScore: Invalid value: 101"},
		"back-off":         {head + "podMaxBackoffSeconds: 0\n", "podMaxBackoffSeconds: Invalid value"},
		"extenders":        {head + "extenders: [{urlPrefix: http://x}]\n", "extenders: Forbidden"},
		"no such plugin":   {profile("plugins: {score: {enabled: [{name: Coscheduling}]}}"), `profiles[0].plugins.score.enabled[0].name: Unsupported value: "Coscheduling"`},
		"nor its arguments": {profile("pluginConfig: [{name: Coscheduling, args: {a: 1}}]"),
			"profiles[0].pluginConfig[0].args: Forbidden"},
		"not at this point":      {profile("plugins: {filter: {enabled: [{name: ImageLocality}]}}"), `profiles[0].plugins.filter.enabled[0].name: Invalid value: "ImageLocality"`},
		"twice":                  {profile("plugins: {score: {enabled: [{name: NodeAffinity}, {name: NodeAffinity}]}}"), "profiles[0].plugins.score.enabled[1].name: Duplicate value"},
		"no binder":              {profile("plugins: {bind: {disabled: [{name: DefaultBinder}]}}"), "profiles[0].plugins.bind: Forbidden: plugin DefaultBinder cannot be left out"},
		"no volumes":             {profile("plugins: {multiPoint: {disabled: [{name: VolumeBinding}]}}"), "plugin VolumeBinding cannot be left out"},
		"half a plugin":          {profile("plugins: {preFilter: {disabled: [{name: InterPodAffinity}]}}"), "profiles[0].plugins.preFilter: Forbidden: plugin InterPodAffinity"},
		"the other half":         {profile("plugins: {filter: {disabled: [{name: VolumeZone}]}}"), "profiles[0].plugins.preFilter: Forbidden: plugin VolumeZone"},
		"half a score":           {profile("plugins: {preScore: {disabled: [{name: InterPodAffinity}]}}"), "profiles[0].plugins.preScore: Forbidden: plugin InterPodAffinity"},
		"strategy":               {profile("pluginConfig: [{name: NodeResourcesFit, args: {scoringStrategy: {type: Best}}}]"), `scoringStrategy.type: Unsupported value: "Best"`},
		"bind timeout":           {profile("pluginConfig: [{name: VolumeBinding, args: {bindTimeoutSeconds: 5}}]"), "profiles[0].pluginConfig[0].args.bindTimeoutSeconds: Forbidden"},
		"arguments of devices":   {profile("pluginConfig: [{name: DynamicResources, args: {filterTimeout: 5s}}]"), "profiles[0].pluginConfig[0].args.filterTimeout: Forbidden"},
		"an affinity's operator": {profile("pluginConfig: [{name: NodeAffinity, args: {addedAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Like}]}]}}}}]"), "operator"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := profiles.Parse([]byte(tc.file))
			require.ErrorContains(t, err, tc.want)
		})
	}
}

// Whatever a file holds is refused or makes a configuration that can be.
func FuzzParse(f *testing.F) {
	f.Add(head)
	f.Add(head + "profiles: [{schedulerName: a, plugins: {multiPoint: {disabled: [{name: '*'}]}}}]\n")
	f.Add(head + "profiles: [{pluginConfig: [{name: NodeResourcesFit, args: {scoringStrategy: {type: MostAllocated}}}]}]\n")
	f.Fuzz(func(t *testing.T, content string) {
		config, err := profiles.Parse([]byte(content))
		if err == nil && config.Validate() != nil {
			t.Errorf("%v", config.Validate())
		}
	})
}
