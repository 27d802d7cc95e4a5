package main

import (
	"context"
	"fmt"
	"reflect"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// workloadNodes is how many Nodes the rows of workloads use, replicas how many pods one
// workload has, jobs how many Jobs of one pod there are.
const workloadNodes, replicas, jobs = 100, 3000, 10000

// workloadRows are the rows that create pods and wait for what becomes of them.
var workloadRows = []struct {
	name string
	run  func(*load, context.Context) (time.Duration, error)
}{
	{"deployment", func(l *load, ctx context.Context) (time.Duration, error) {
		return l.bound(ctx, "deployment", func(ns string, meta metav1.ObjectMeta, selector *metav1.LabelSelector, t corev1.PodTemplateSpec) error {
			n := int32(replicas)
			_, err := l.clients[0].AppsV1().Deployments(ns).Create(ctx, &appsv1.Deployment{ObjectMeta: meta,
				Spec: appsv1.DeploymentSpec{Replicas: &n, Selector: selector, Template: t}}, metav1.CreateOptions{})
			return err
		})
	}},
	{"statefulset", func(l *load, ctx context.Context) (time.Duration, error) {
		return l.bound(ctx, "statefulset", func(ns string, meta metav1.ObjectMeta, selector *metav1.LabelSelector, t corev1.PodTemplateSpec) error {
			n := int32(replicas)
			_, err := l.clients[0].AppsV1().StatefulSets(ns).Create(ctx, &appsv1.StatefulSet{ObjectMeta: meta,
				Spec: appsv1.StatefulSetSpec{Replicas: &n, Selector: selector, Template: t, PodManagementPolicy: appsv1.ParallelPodManagement}}, metav1.CreateOptions{})
			return err
		})
	}},
	{"job", func(l *load, ctx context.Context) (time.Duration, error) {
		return l.bound(ctx, "job", func(ns string, meta metav1.ObjectMeta, _ *metav1.LabelSelector, t corev1.PodTemplateSpec) error {
			n := int32(replicas)
			t.Spec.RestartPolicy = corev1.RestartPolicyNever
			_, err := l.clients[0].BatchV1().Jobs(ns).Create(ctx, &batchv1.Job{ObjectMeta: meta,
				Spec: batchv1.JobSpec{Parallelism: &n, Completions: &n, Template: t}}, metav1.CreateOptions{})
			return err
		})
	}},
	{"jobs", (*load).finished},
}

// podTemplate is that of the rows' workloads. No agent reports for the Nodes, so the pods
// tolerate whatever is held against those.
func podTemplate(row string) (metav1.ObjectMeta, *metav1.LabelSelector, corev1.PodTemplateSpec) {
	set, none := map[string]string{"app": row}, int64(0)
	return metav1.ObjectMeta{Name: row, Labels: set}, &metav1.LabelSelector{MatchLabels: set}, corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: set},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &none,
			Tolerations:                   []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
			Containers: []corev1.Container{{Name: "main", Image: "registry.example/app:1", Resources: corev1.ResourceRequirements{
				Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m"), corev1.ResourceMemory: resource.MustParse("16Mi")},
			}}},
		},
	}
}

// room makes the Nodes and a namespace of a row.
func (l *load) room(ctx context.Context, row string) (namespace string, err error) {
	capacity := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("64"), corev1.ResourceMemory: resource.MustParse("256Gi"), corev1.ResourcePods: resource.MustParse("1000")}
	for i := range workloadNodes {
		name := fmt.Sprintf("%s-%d", l.namespace, i)
		_, err := l.clients[0].CoreV1().Nodes().Create(ctx, &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name, corev1.LabelTopologyZone: fmt.Sprint("zone-", i%3)}},
			Status: corev1.NodeStatus{Capacity: capacity, Allocatable: capacity, Conditions: []corev1.NodeCondition{{
				Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "Bench", LastHeartbeatTime: metav1.Now(), LastTransitionTime: metav1.Now()}}},
		}, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return "", err
		}
	}
	if err := l.nodesAtRest(ctx); err != nil {
		return "", err
	}
	namespace = l.namespace + "-" + row
	return namespace, l.newNamespace(ctx, namespace)
}

// newNamespace makes a namespace with its service account, in which pods are let in.
func (l *load) newNamespace(ctx context.Context, namespace string) error {
	if _, err := l.clients[0].CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{}); err != nil {
		return err
	}
	return until(ctx, "the service account of namespace "+namespace, nil, func(ctx context.Context) error {
		_, err := l.clients[0].CoreV1().ServiceAccounts(namespace).Get(ctx, "default", getOptions)
		return err
	})
}

// nodesAtRest waits until nobody changes the Nodes any more: each new one gets a range of
// addresses, and taints for want of an agent, which is no part of a row.
func (l *load) nodesAtRest(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
	defer cancel()
	for before, same := "", 0; same < 4; {
		nodes, err := l.clients[0].CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		var versions strings.Builder
		for _, n := range nodes.Items {
			versions.WriteString(n.ResourceVersion + " ")
		}
		if same++; versions.String() != before {
			before, same = versions.String(), 0
		}
		if err := sleep(ctx, 500*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// rowPatience is how long a row of workloads may take.
const rowPatience = 5 * time.Minute

// bound returns the time from the creation of a workload until all of its pods have a Node.
func (l *load) bound(ctx context.Context, row string, create func(namespace string, meta metav1.ObjectMeta, selector *metav1.LabelSelector, t corev1.PodTemplateSpec) error) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, rowPatience)
	defer cancel()
	namespace, err := l.room(ctx, row)
	if err != nil {
		return 0, err
	}
	pods := follow[*corev1.Pod](ctx, l.clients[0].CoreV1().RESTClient(), "pods", namespace)
	begin := time.Now()
	meta, selector, template := podTemplate(row)
	if err := create(namespace, meta, selector, template); err != nil {
		return 0, err
	}
	placed := map[types.UID]bool{}
	for len(placed) < replicas {
		pod, err := next(ctx, pods)
		if err != nil {
			return 0, fmt.Errorf("%d of %d pods have a Node: %w", len(placed), replicas, err)
		}
		if pod.Spec.NodeName != "" {
			placed[pod.UID] = true
		}
	}
	return time.Since(begin), nil
}

// follow lists and watches a resource in a namespace until ctx ends, and again when the
// server ends the watch of a client that is too slow for it.
func follow[T runtime.Object](ctx context.Context, client rest.Interface, resource, namespace string) <-chan T {
	var none T
	kind := reflect.New(reflect.TypeOf(none).Elem()).Interface().(T)
	out := make(chan T, 1024)
	send := func(obj any) {
		if o, ok := obj.(T); ok {
			select {
			case out <- o:
			case <-ctx.Done():
			}
		}
	}
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(client, resource, namespace, fields.Everything()), ObjectType: kind,
		Handler: cache.ResourceEventHandlerFuncs{AddFunc: send, UpdateFunc: func(_, obj any) { send(obj) }},
	})
	go informer.RunWithContext(ctx)
	return out
}

// next is the next object that was created or changed.
func next[T any](ctx context.Context, objects <-chan T) (obj T, err error) {
	select {
	case obj = <-objects:
		return obj, nil
	case <-ctx.Done():
		return obj, ctx.Err()
	}
}

// finished returns the time from the first of many Jobs' creation until the last has
// finished. Clients stand in for agents: they say that each pod which has a Node has succeeded.
func (l *load) finished(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, rowPatience)
	defer cancel()
	namespace, err := l.room(ctx, "jobs")
	if err != nil {
		return 0, err
	}
	pods := follow[*corev1.Pod](ctx, l.clients[0].CoreV1().RESTClient(), "pods", namespace)
	ended := follow[*batchv1.Job](ctx, l.clients[len(l.clients)-1].BatchV1().RESTClient(), "jobs", namespace)

	begin := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	todo, toRun := make(chan int, jobs), make(chan *corev1.Pod, jobs)
	for i := range jobs {
		todo <- i
	}
	close(todo)
	_, _, template := podTemplate("jobs")
	template.Spec.RestartPolicy = corev1.RestartPolicyNever
	for i := range l.clients {
		if i%2 == 0 {
			group.Go(func() error {
				for n := range todo {
					_, err := l.clients[i].BatchV1().Jobs(namespace).Create(ctx, &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("job-", n)},
						Spec: batchv1.JobSpec{Template: template}}, metav1.CreateOptions{})
					if err != nil {
						return err
					}
				}
				return nil
			})
			continue
		}
		group.Go(func() error {
			for pod := range toRun {
				if err := l.succeed(ctx, i, pod); err != nil {
					return err
				}
			}
			return nil
		})
	}
	group.Go(func() error {
		defer close(toRun)
		for seen := map[types.UID]bool{}; len(seen) < jobs; {
			pod, err := next(ctx, pods)
			if err != nil {
				return fmt.Errorf("%d of %d pods have a Node: %w", len(seen), jobs, err)
			}
			if pod.Spec.NodeName != "" && !seen[pod.UID] {
				seen[pod.UID] = true
				toRun <- pod
			}
		}
		return nil
	})
	group.Go(func() error {
		for seen := map[types.UID]bool{}; len(seen) < jobs; {
			job, err := next(ctx, ended)
			if err != nil {
				return fmt.Errorf("%d of %d Jobs are complete: %w", len(seen), jobs, err)
			}
			for _, c := range job.Status.Conditions {
				if c.Type == batchv1.JobComplete && c.Status == corev1.ConditionTrue {
					seen[job.UID] = true
				}
			}
		}
		return nil
	})
	if err := group.Wait(); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
}

// succeed says in a pod's status what an agent says of one that ran to its end.
func (l *load) succeed(ctx context.Context, client int, pod *corev1.Pod) error {
	now := metav1.Now()
	done := pod.DeepCopy()
	done.Status.Phase, done.Status.StartTime = corev1.PodSucceeded, &now
	done.Status.ContainerStatuses = []corev1.ContainerStatus{{
		Name: "main", Image: pod.Spec.Containers[0].Image,
		State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: "Completed", StartedAt: now, FinishedAt: now}},
	}}
	for {
		_, err := l.clients[client].CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, done, metav1.UpdateOptions{})
		if !apierrors.IsConflict(err) {
			return err
		}
		newer, err := l.clients[client].CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, getOptions)
		if err != nil {
			return err
		}
		newer.Status.Phase, newer.Status.StartTime, newer.Status.ContainerStatuses = done.Status.Phase, done.Status.StartTime, done.Status.ContainerStatuses
		done = newer
	}
}
