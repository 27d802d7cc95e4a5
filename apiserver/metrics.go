package apiserver

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/generic"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	corelisters "k8s.io/client-go/listers/core/v1"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	aggregator "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset/typed/apiregistration/v1"
	"k8s.io/metrics/pkg/apis/metrics"
	metricsinstall "k8s.io/metrics/pkg/apis/metrics/install"
	metricsv1beta1 "k8s.io/metrics/pkg/apis/metrics/v1beta1"
)

// NodeUsage is what a node takes, and the containers of its pods.
type NodeUsage struct {
	When        time.Time     // of the end of Window
	Window      time.Duration // over which CPU was measured
	CPU, Memory uint64        // billionths of a CPU, and bytes
	Pods        map[types.UID][]ContainerUsage
}

// ContainerUsage is what a container takes, as [NodeUsage] has it.
type ContainerUsage struct {
	Name        string
	CPU, Memory uint64
}

// Usage tells what nodes take, those of them that say so.
type Usage func(ctx context.Context, nodes []string) map[string]NodeUsage

// metricsScheme knows the types of metrics.k8s.io, which no other API refers to.
func metricsScheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	metricsinstall.Install(scheme)
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	return scheme
}

// metricsProvider serves metrics.k8s.io from what agents say of their nodes. Nothing of it
// is stored: what a node took is known while its agent is connected.
type metricsProvider struct {
	usage Usage
	nodes corelisters.NodeLister
	pods  corelisters.PodLister
}

// GroupName implements controlplaneapiserver.RESTStorageProvider.
func (p metricsProvider) GroupName() string { return metrics.GroupName }

// NewRESTStorage implements controlplaneapiserver.RESTStorageProvider.
func (p metricsProvider) NewRESTStorage(serverstorage.APIResourceConfigSource, generic.RESTOptionsGetter) (genericapiserver.APIGroupInfo, error) {
	scheme := metricsScheme()
	info := genericapiserver.NewDefaultAPIGroupInfo(metrics.GroupName, scheme, runtime.NewParameterCodec(scheme), serializer.NewCodecFactory(scheme))
	info.PrioritizedVersions = []schema.GroupVersion{metricsv1beta1.SchemeGroupVersion}
	info.VersionedResourcesStorageMap[metricsv1beta1.SchemeGroupVersion.Version] = map[string]rest.Storage{
		"nodes": &nodeMetrics{p}, "pods": &podMetrics{p},
	}
	return info, nil
}

type nodeMetrics struct{ metricsProvider }

var (
	_ rest.Getter = (*nodeMetrics)(nil)
	_ rest.Lister = (*nodeMetrics)(nil)
	_ rest.Getter = (*podMetrics)(nil)
	_ rest.Lister = (*podMetrics)(nil)
)

func (*nodeMetrics) New() runtime.Object     { return &metrics.NodeMetrics{} }
func (*nodeMetrics) NewList() runtime.Object { return &metrics.NodeMetricsList{} }
func (*nodeMetrics) Destroy()                {}
func (*nodeMetrics) Kind() string            { return "NodeMetrics" }
func (*nodeMetrics) GetSingularName() string { return "" }
func (*nodeMetrics) NamespaceScoped() bool   { return false }

func (m *nodeMetrics) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	node, err := m.nodes.Get(name)
	if err != nil {
		return nil, notThere(err, "nodes", name)
	}
	list := m.of(ctx, []*corev1.Node{node})
	if len(list) == 0 {
		return nil, apierrors.NewNotFound(metrics.Resource("nodes"), name)
	}
	return &list[0], nil
}

func (m *nodeMetrics) List(ctx context.Context, options *internalversion.ListOptions) (runtime.Object, error) {
	byLabel, byField := selectors(options)
	nodes, err := m.nodes.List(byLabel)
	if err != nil {
		return nil, err
	}
	nodes = slices.DeleteFunc(slices.Clone(nodes), func(n *corev1.Node) bool {
		return !byField.Matches(fields.Set{"metadata.name": n.Name})
	})
	slices.SortFunc(nodes, func(a, b *corev1.Node) int { return strings.Compare(a.Name, b.Name) })
	return &metrics.NodeMetricsList{Items: m.of(ctx, nodes)}, nil
}

func (m *nodeMetrics) of(ctx context.Context, nodes []*corev1.Node) []metrics.NodeMetrics {
	names := make([]string, len(nodes))
	for i, n := range nodes {
		names[i] = n.Name
	}
	out := []metrics.NodeMetrics{}
	taken := m.usage(ctx, names)
	for _, n := range nodes {
		u, ok := taken[n.Name]
		if !ok {
			continue
		}
		out = append(out, metrics.NodeMetrics{
			ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: n.Labels, CreationTimestamp: metav1.Now()},
			Timestamp:  metav1.NewTime(u.When), Window: metav1.Duration{Duration: u.Window}, Usage: resources(u.CPU, u.Memory),
		})
	}
	return out
}

func (m *nodeMetrics) ConvertToTable(_ context.Context, object, _ runtime.Object) (*metav1.Table, error) {
	switch o := object.(type) {
	case *metrics.NodeMetrics:
		return metricsTable([]metrics.NodeMetrics{*o}, nodeRow), nil
	case *metrics.NodeMetricsList:
		return metricsTable(o.Items, nodeRow), nil
	}
	return nil, fmt.Errorf("no table of %T", object)
}

type podMetrics struct{ metricsProvider }

func (*podMetrics) New() runtime.Object     { return &metrics.PodMetrics{} }
func (*podMetrics) NewList() runtime.Object { return &metrics.PodMetricsList{} }
func (*podMetrics) Destroy()                {}
func (*podMetrics) Kind() string            { return "PodMetrics" }
func (*podMetrics) GetSingularName() string { return "" }
func (*podMetrics) NamespaceScoped() bool   { return true }

func (m *podMetrics) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	namespace := request.NamespaceValue(ctx)
	pod, err := m.pods.Pods(namespace).Get(name)
	if err != nil {
		return nil, notThere(err, "pods", namespace+"/"+name)
	}
	list := m.of(ctx, []*corev1.Pod{pod})
	if len(list) == 0 {
		return nil, apierrors.NewNotFound(metrics.Resource("pods"), namespace+"/"+name)
	}
	return &list[0], nil
}

func (m *podMetrics) List(ctx context.Context, options *internalversion.ListOptions) (runtime.Object, error) {
	byLabel, byField := selectors(options)
	pods, err := m.pods.Pods(request.NamespaceValue(ctx)).List(byLabel)
	if err != nil {
		return nil, err
	}
	pods = slices.DeleteFunc(slices.Clone(pods), func(p *corev1.Pod) bool {
		return !byField.Matches(fields.Set{"metadata.name": p.Name, "metadata.namespace": p.Namespace, "spec.nodeName": p.Spec.NodeName})
	})
	slices.SortFunc(pods, func(a, b *corev1.Pod) int {
		if c := strings.Compare(a.Namespace, b.Namespace); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	return &metrics.PodMetricsList{Items: m.of(ctx, pods)}, nil
}

func (m *podMetrics) of(ctx context.Context, pods []*corev1.Pod) []metrics.PodMetrics {
	var names []string
	for _, p := range pods {
		if p.Spec.NodeName != "" {
			names = append(names, p.Spec.NodeName)
		}
	}
	slices.Sort(names)
	taken := m.usage(ctx, slices.Compact(names))
	out := []metrics.PodMetrics{}
	for _, p := range pods {
		u, ok := taken[p.Spec.NodeName]
		containers := u.Pods[p.UID]
		if !ok || len(containers) == 0 {
			continue
		}
		one := metrics.PodMetrics{
			ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels, CreationTimestamp: metav1.Now()},
			Timestamp:  metav1.NewTime(u.When), Window: metav1.Duration{Duration: u.Window},
		}
		for _, c := range containers {
			one.Containers = append(one.Containers, metrics.ContainerMetrics{Name: c.Name, Usage: resources(c.CPU, c.Memory)})
		}
		out = append(out, one)
	}
	return out
}

func (m *podMetrics) ConvertToTable(_ context.Context, object, _ runtime.Object) (*metav1.Table, error) {
	switch o := object.(type) {
	case *metrics.PodMetrics:
		return metricsTable([]metrics.PodMetrics{*o}, podRow), nil
	case *metrics.PodMetricsList:
		return metricsTable(o.Items, podRow), nil
	}
	return nil, fmt.Errorf("no table of %T", object)
}

// notThere says of metrics what a lister says of the object that they are of.
func notThere(err error, what, name string) error {
	if apierrors.IsNotFound(err) {
		return apierrors.NewNotFound(metrics.Resource(what), name)
	}
	return err
}

func selectors(options *internalversion.ListOptions) (labels.Selector, fields.Selector) {
	byLabel, byField := labels.Everything(), fields.Everything()
	if options != nil && options.LabelSelector != nil {
		byLabel = options.LabelSelector
	}
	if options != nil && options.FieldSelector != nil {
		byField = options.FieldSelector
	}
	return byLabel, byField
}

// resources are what an agent said, which may be anything.
func resources(cpu, memory uint64) corev1.ResourceList {
	return corev1.ResourceList{
		corev1.ResourceCPU:    *resource.NewScaledQuantity(int64(min(cpu, math.MaxInt64)), resource.Nano),
		corev1.ResourceMemory: *resource.NewQuantity(int64(min(memory, math.MaxInt64)), resource.BinarySI),
	}
}

// metricsTable is as metrics-server's.
func metricsTable[T any](items []T, row func(*T) (usage corev1.ResourceList, window time.Duration, object metav1.ObjectMeta)) *metav1.Table {
	table := &metav1.Table{ColumnDefinitions: []metav1.TableColumnDefinition{
		{Name: "Name", Type: "string", Format: "name", Description: "Name of the resource"},
		{Name: "cpu", Type: "string", Format: "quantity"},
		{Name: "memory", Type: "string", Format: "quantity"},
		{Name: "Window", Type: "string", Format: "duration"},
	}}
	for i := range items {
		usage, window, meta := row(&items[i])
		table.Rows = append(table.Rows, metav1.TableRow{
			Cells:  []any{meta.Name, usage.Cpu().String(), usage.Memory().String(), window.String()},
			Object: runtime.RawExtension{Object: &metav1.PartialObjectMetadata{ObjectMeta: meta}},
		})
	}
	return table
}

func nodeRow(m *metrics.NodeMetrics) (corev1.ResourceList, time.Duration, metav1.ObjectMeta) {
	return m.Usage, m.Window.Duration, m.ObjectMeta
}

func podRow(m *metrics.PodMetrics) (corev1.ResourceList, time.Duration, metav1.ObjectMeta) {
	sum := corev1.ResourceList{corev1.ResourceCPU: resource.Quantity{}, corev1.ResourceMemory: resource.Quantity{}}
	for _, c := range m.Containers {
		for name, total := range sum {
			total.Add(c.Usage[name])
			sum[name] = total
		}
	}
	return sum, m.Window.Duration, m.ObjectMeta
}

// metricsService makes the APIService of metrics.k8s.io when there is none. It is no one
// of those that upstream keeps as they were, so that somebody's own metrics server, whose
// manifest puts its Service there, is asked from then on. When that APIService is deleted,
// ours is made again.
type metricsService struct {
	services aggregator.APIServicesGetter
}

// metricsRecheck is how often it is looked whether there is one. Nothing is written for it.
const metricsRecheck = 10 * time.Second

// keep makes the APIService when there is none, until ctx ends.
func (m *metricsService) keep(ctx context.Context) {
	said := ""
	for {
		if err := m.ensure(ctx); err != nil && ctx.Err() == nil {
			if text := err.Error(); text != said {
				said = text
				slog.Warn("the APIService of metrics.k8s.io cannot be made; trying again: kubectl top and autoscalers find no metrics until then", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(metricsRecheck):
		}
	}
}

func (m *metricsService) ensure(ctx context.Context) error {
	name := metricsv1beta1.SchemeGroupVersion.Version + "." + metrics.GroupName
	if _, err := m.services.APIServices().Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return err
	}
	_, err := m.services.APIServices().Create(ctx, &apiregistrationv1.APIService{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: apiregistrationv1.APIServiceSpec{
			Group: metrics.GroupName, Version: metricsv1beta1.SchemeGroupVersion.Version,
			GroupPriorityMinimum: 100, VersionPriority: 100, // as metrics-server's
		},
	}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}
