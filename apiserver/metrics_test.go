package apiserver

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/endpoints/request"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	aggregatorfake "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset/fake"
	"k8s.io/metrics/pkg/apis/metrics"

	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
)

func metricsOf(t *testing.T) (*nodeMetrics, *podMetrics, *[]string) {
	t.Helper()
	nodes, pods := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{}), cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
	for name, zone := range map[string]string{"a1": "x", "a2": "y", "dead": "x"} {
		require.NoError(t, nodes.Add(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"zone": zone}}}))
	}
	for _, p := range []struct{ namespace, name, uid, node string }{
		{"n", "web", "u1", "a1"}, {"n", "new", "u2", "a1"}, {"m", "db", "u3", "a2"}, {"n", "lost", "u4", "dead"}, {"n", "waits", "u5", ""},
	} {
		require.NoError(t, pods.Add(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, Name: p.name, UID: types.UID(p.uid), Labels: map[string]string{"app": p.name}},
			Spec:       corev1.PodSpec{NodeName: p.node},
		}))
	}
	asked := &[]string{}
	p := metricsProvider{
		usage: func(_ context.Context, names []string) map[string]NodeUsage {
			*asked = names
			out := map[string]NodeUsage{}
			for _, name := range names {
				switch name {
				case "a1":
					out[name] = NodeUsage{When: time.Unix(1000, 0), Window: 15 * time.Second, CPU: 1_500_000_000, Memory: 3 << 30, Pods: map[types.UID][]ContainerUsage{
						"u1": {{"app", 250_000_000, 1 << 20}, {"side", 1, 2 << 20}},
						"u3": {{"not here", 1, 1}}, // a node says what it likes, of its own pods
					}}
				case "a2":
					out[name] = NodeUsage{When: time.Unix(1000, 0), Window: 15 * time.Second, Pods: map[types.UID][]ContainerUsage{"u3": {{"db", 1_000_000, 1<<64 - 1}}}}
				}
			}
			return out
		},
		nodes: corelisters.NewNodeLister(nodes), pods: corelisters.NewPodLister(pods),
	}
	return &nodeMetrics{p}, &podMetrics{p}, asked
}

func TestNodeMetrics(t *testing.T) {
	t.Parallel()
	m, _, asked := metricsOf(t)
	got, err := m.Get(t.Context(), "a1", nil)
	require.NoError(t, err)
	one := got.(*metrics.NodeMetrics)
	require.Equal(t, "1500m", one.Usage.Cpu().String())
	require.Equal(t, "3Gi", one.Usage.Memory().String())
	require.Equal(t, 15*time.Second, one.Window.Duration)
	require.Equal(t, time.Unix(1000, 0), one.Timestamp.Time)
	require.Equal(t, []string{"a1"}, *asked)
	for _, name := range []string{"dead", "nobody"} {
		_, err = m.Get(t.Context(), name, nil)
		require.True(t, apierrors.IsNotFound(err), "%s: %v", name, err)
		require.ErrorContains(t, err, `nodes.metrics.k8s.io "`+name+`" not found`)
	}
	list, err := m.List(t.Context(), nil)
	require.NoError(t, err)
	require.Len(t, list.(*metrics.NodeMetricsList).Items, 2, "of the dead one nobody says anything")
	list, err = m.List(t.Context(), &internalversion.ListOptions{LabelSelector: labels.SelectorFromSet(labels.Set{"zone": "y"})})
	require.NoError(t, err)
	require.Equal(t, "a2", list.(*metrics.NodeMetricsList).Items[0].Name)
	table, err := m.ConvertToTable(t.Context(), one, nil)
	require.NoError(t, err)
	require.Equal(t, []any{"a1", "1500m", "3Gi", "15s"}, table.Rows[0].Cells)
}

func TestPodMetrics(t *testing.T) {
	t.Parallel()
	_, m, asked := metricsOf(t)
	in := func(namespace string) context.Context { return request.WithNamespace(t.Context(), namespace) }
	got, err := m.Get(in("n"), "web", nil)
	require.NoError(t, err)
	one := got.(*metrics.PodMetrics)
	require.Len(t, one.Containers, 2)
	require.Equal(t, "250m", one.Containers[0].Usage.Cpu().String())
	require.Equal(t, "web", one.Labels["app"])
	for _, name := range []string{"new", "lost", "waits", "nobody", "db"} {
		_, err = m.Get(in("n"), name, nil)
		require.True(t, apierrors.IsNotFound(err), "%s: %v", name, err)
	}
	names := func(namespace string, o *internalversion.ListOptions) (out []string) {
		list, err := m.List(in(namespace), o)
		require.NoError(t, err)
		for _, p := range list.(*metrics.PodMetricsList).Items {
			out = append(out, p.Namespace+"/"+p.Name)
		}
		return out
	}
	require.Equal(t, []string{"m/db", "n/web"}, names("", nil))
	require.Equal(t, []string{"a1", "a2", "dead"}, *asked, "each node once")
	require.Equal(t, []string{"n/web"}, names("n", nil))
	require.Equal(t, []string{"m/db"}, names("", &internalversion.ListOptions{LabelSelector: labels.SelectorFromSet(labels.Set{"app": "db"})}))
	require.Equal(t, []string{"a2"}, *asked, "those of the pods that are asked for")
	require.Empty(t, names("", &internalversion.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", "x")}))
	db, err := m.Get(in("m"), "db", nil)
	require.NoError(t, err)
	require.Equal(t, "db", db.(*metrics.PodMetrics).Containers[0].Name, "its own node's word")
	require.Positive(t, db.(*metrics.PodMetrics).Containers[0].Usage.Memory().Value())
	table, err := m.ConvertToTable(t.Context(), one, nil)
	require.NoError(t, err)
	require.Equal(t, []any{"web", "250000001n", "3Mi", "15s"}, table.Rows[0].Cells)
}

// Somebody's own metrics server, whose Service its APIService names, is not displaced, and
// when it goes there is ours again.
func TestMetricsServiceIsSomebodysOwn(t *testing.T) {
	t.Parallel()
	client := aggregatorfake.NewSimpleClientset().ApiregistrationV1()
	m := &metricsService{client}
	ctx := t.Context()
	require.NoError(t, m.ensure(ctx))
	ours, err := client.APIServices().Get(ctx, "v1beta1.metrics.k8s.io", metav1.GetOptions{})
	require.NoError(t, err)
	require.Nil(t, ours.Spec.Service, "it is served here")
	require.Empty(t, ours.Labels, "upstream would put one back that it manages")
	ours.Spec.Service = &apiregistrationv1.ServiceReference{Namespace: "kube-system", Name: "metrics-server"}
	_, err = client.APIServices().Update(ctx, ours, metav1.UpdateOptions{})
	require.NoError(t, err)
	require.NoError(t, m.ensure(ctx))
	theirs, err := client.APIServices().Get(ctx, ours.Name, metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, "metrics-server", theirs.Spec.Service.Name)
	require.NoError(t, client.APIServices().Delete(ctx, ours.Name, metav1.DeleteOptions{}))
	require.NoError(t, m.ensure(ctx))
	_, err = client.APIServices().Get(ctx, ours.Name, metav1.GetOptions{})
	require.NoError(t, err)
}
