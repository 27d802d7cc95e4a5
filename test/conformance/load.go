package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"timonel/internal/cluster"
)

const (
	loadNamespace = "conformance-load"
	writers       = 4 // clients that make, change and delete objects
	runners       = 4 // clients that make, change and delete pods
)

// load is other clients at work while the tests run, each as fast as it may, and
// computing that takes what the cores have left.
type load struct {
	clients                *kubernetes.Clientset
	cancel                 context.CancelFunc
	wg                     sync.WaitGroup
	objects, pods, refused atomic.Int64
}

func startLoad(ctx context.Context, spec *cluster.Spec) (*load, error) {
	config, err := spec.RESTConfig(spec.Name)
	if err != nil {
		return nil, err
	}
	config.Timeout = 30 * time.Second
	clients, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	_, err = clients.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: loadNamespace}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, fmt.Errorf("make the load's namespace: %w", err)
	}
	l := &load{clients: clients}
	ctx, l.cancel = context.WithCancel(ctx)
	again := func(name string, once func(context.Context, string) error) {
		l.wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				if err := once(ctx, fmt.Sprintf("%s-%d", name, n)); err != nil && ctx.Err() == nil {
					l.refused.Add(1)
					select { // whoever refused has enough to do
					case <-ctx.Done():
					case <-time.After(100 * time.Millisecond):
					}
				}
			}
		})
	}
	for i := range writers {
		again(fmt.Sprintf("object-%d", i), l.object)
	}
	for i := range runners {
		again(fmt.Sprintf("pod-%d", i), l.pod)
	}
	for range runtime.NumCPU() {
		l.wg.Go(func() { compute(ctx) })
	}
	return l, nil
}

// stop ends the load and says what it did.
func (l *load) stop() string {
	l.cancel()
	l.wg.Wait()
	return fmt.Sprintf("load meanwhile: %d objects and %d pods made, changed and deleted, %d requests refused", l.objects.Load(), l.pods.Load(), l.refused.Load())
}

func compute(ctx context.Context) {
	var sum [sha256.Size]byte
	for ctx.Err() == nil {
		for range 1000 {
			sum = sha256.Sum256(sum[:])
		}
	}
}

var change = []byte(`{"metadata":{"annotations":{"changed":"yes"},"labels":{"changed":"yes"}}}`)

// object makes, changes and deletes a ConfigMap of 16 KiB.
func (l *load) object(ctx context.Context, name string) error {
	api := l.clients.CoreV1().ConfigMaps(loadNamespace)
	if _, err := api.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name},
		Data: map[string]string{"value": strings.Repeat("x", 16<<10)}}, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	_, err := api.Patch(ctx, name, types.MergePatchType, change, metav1.PatchOptions{})
	if err := errors.Join(err, api.Delete(ctx, name, metav1.DeleteOptions{})); err != nil {
		return err
	}
	l.objects.Add(1)
	return nil
}

// pod makes a pod that shows its labels in a volume, changes them once it runs, and
// deletes it.
func (l *load) pod(ctx context.Context, name string) error {
	api := l.clients.CoreV1().Pods(loadNamespace)
	if _, err := api.Create(ctx, loadPod(name), metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	err := l.wait(ctx, name, func(pod *corev1.Pod) bool { return pod == nil || pod.Status.Phase != corev1.PodPending })
	if err == nil {
		_, err = api.Patch(ctx, name, types.MergePatchType, change, metav1.PatchOptions{})
	}
	now := int64(1)
	if err := errors.Join(err, api.Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &now})); err != nil {
		return err
	}
	l.pods.Add(1)
	return l.wait(ctx, name, func(pod *corev1.Pod) bool { return pod == nil })
}

// wait waits until the pod, nil when it is gone, is as wanted.
func (l *load) wait(ctx context.Context, name string, wanted func(*corev1.Pod) bool) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	for {
		pod, err := l.clients.CoreV1().Pods(loadNamespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			pod, err = nil, nil
		}
		if err == nil && wanted(pod) {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func loadPod(name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"load": "conformance"}},
		Spec: corev1.PodSpec{
			Containers: []corev1.Container{{Name: "pause", Image: "timonel/pause:latest", ImagePullPolicy: corev1.PullIfNotPresent,
				VolumeMounts: []corev1.VolumeMount{{Name: "labels", MountPath: "/labels"}}}},
			Volumes: []corev1.Volume{{Name: "labels", VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{
				Items: []corev1.DownwardAPIVolumeFile{{Path: "labels", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels"}}}}}}},
		},
	}
}
