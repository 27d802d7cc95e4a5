package apiserver

import (
	"context"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/kubernetes"
)

// directPod is a pod as a controller makes it, with fields of all sorts.
func directPod(namespace, name string) *corev1.Pod {
	yes := true
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name, GenerateName: "web-", Labels: map[string]string{"app": "web", "pod": name}, Annotations: map[string]string{"index": name},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: "owner", Controller: &yes, BlockOwnerDeletion: &yes}},
		},
		Spec: corev1.PodSpec{
			Hostname:    name,
			Volumes:     []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data-" + name}}}},
			Tolerations: []corev1.Toleration{{Key: "a", Operator: corev1.TolerationOpExists}},
			Containers: []corev1.Container{{
				Name: "main", Image: "app:1", Env: []corev1.EnvVar{{Name: "A", Value: "1"}}, Ports: []corev1.ContainerPort{{ContainerPort: 80}},
				Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m")}},
			}},
		},
	}
}

func directEvent(namespace, name string) *corev1.Event {
	now := metav1.Now()
	return &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: namespace, Name: name},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: namespace, Name: name, UID: types.UID(name), ResourceVersion: "1"},
		Reason:         "Scheduled", Message: "assigned " + name, Type: corev1.EventTypeNormal, FirstTimestamp: now, LastTimestamp: now, Count: 1,
		Source: corev1.EventSource{Component: "sched", Host: "c1"}, ReportingController: "sched", ReportingInstance: "c1",
	}
}

// directFixture is a namespace with a service account, its client, and a Direct.
func directFixture(t *testing.T, name string) (context.Context, *kubernetes.Clientset, *Direct) {
	t.Helper()
	f := shareServer(t)
	c, ctx := client(t, f.admin()), within(t, time.Minute)
	if _, err := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CoreV1().ServiceAccounts(name).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return ctx, c, f.server.Direct(&user.DefaultInfo{Name: "admin", Groups: []string{user.SystemPrivilegedGroup}})
}

// createPod creates a pod by HTTP, as a reconciler's client does, and has d learn from it.
func createPod(ctx context.Context, t *testing.T, c *kubernetes.Clientset, d *Direct, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	created, err := c.CoreV1().Pods(pod.Namespace).Create(ctx, pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	d.Created(pod, created)
	return created
}

// alike takes out of an object what has to differ from that of another one.
func alike(m metav1.Object) {
	m.SetName("")
	m.SetUID("")
	m.SetResourceVersion("")
	m.SetCreationTimestamp(metav1.Time{})
	fields := m.GetManagedFields()
	for i := range fields {
		fields[i].Time = nil
	}
}

// TestDirectCreatesAsHTTP compares what is stored of objects that were created both ways.
func TestDirectCreatesAsHTTP(t *testing.T) {
	ctx, c, d := directFixture(t, "direct")
	first := directPod("direct", "first")
	if done, err := d.Create(ctx, first); done || err != nil {
		t.Fatalf("a pod whose managed fields are not known: %v, %v; want HTTP", done, err)
	}
	byHTTP := createPod(ctx, t, c, d, first)
	second := directPod("direct", "second")
	sent := second.DeepCopy()
	if done, err := d.Create(ctx, second); !done || err != nil {
		t.Fatalf("a pod of a known shape: %v, %v", done, err)
	}
	if !equality.Semantic.DeepEqual(second, sent) {
		t.Error("the caller's pod was changed")
	}
	direct, err := c.CoreV1().Pods("direct").Get(ctx, "second", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if direct.UID == "" || direct.CreationTimestamp.IsZero() || len(direct.ManagedFields) != 1 || direct.ManagedFields[0].Time.IsZero() {
		t.Errorf("metadata of the pod: %v", direct.ObjectMeta)
	}
	for _, p := range []*corev1.Pod{byHTTP, direct} {
		alike(p)
		p.Labels["pod"], p.Annotations["index"], p.Spec.Hostname, p.Spec.Volumes[0].PersistentVolumeClaim.ClaimName = "", "", "", ""
		for i := range p.Spec.Volumes {
			p.Spec.Volumes[i].Name = ""
		}
		for i := range p.Spec.Containers[0].VolumeMounts {
			p.Spec.Containers[0].VolumeMounts[i].Name = "" // the token's volume has a random name
		}
	}
	if !equality.Semantic.DeepEqual(byHTTP, direct) {
		t.Errorf("stored otherwise:\nby HTTP %v\ndirectly %v", byHTTP, direct)
	}

	event := directEvent("direct", "e1")
	if done, _ := d.Create(ctx, event); done {
		t.Fatal("an event of a shape not known was created")
	}
	first1, err := c.CoreV1().Events("direct").Create(ctx, event, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	d.Created(event, first1)
	if done, err := d.Create(ctx, directEvent("direct", "e2")); !done || err != nil {
		t.Fatalf("an event of a known shape: %v, %v", done, err)
	}
	second1, err := c.CoreV1().Events("direct").Get(ctx, "e2", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []*corev1.Event{first1, second1} {
		alike(e)
		e.InvolvedObject.Name, e.InvolvedObject.UID, e.Message = "", "", ""
		e.FirstTimestamp, e.LastTimestamp = metav1.Time{}, metav1.Time{}
	}
	if !equality.Semantic.DeepEqual(first1, second1) {
		t.Errorf("stored otherwise:\nby HTTP %v\ndirectly %v", first1, second1)
	}
}

// TestShapes changes a pod in one field after the other. Whenever the API gives the changed
// pod other managed fields, its shape must differ; shapes of pods of one workload must not.
func TestShapes(t *testing.T) {
	ctx, c, d := directFixture(t, "shapes")
	base := directPod("shapes", "base")
	created := createPod(ctx, t, c, d, base)
	shape, _ := shapeOf(base)
	for i, edit := range []struct {
		name string
		same bool
		edit func(*corev1.Pod)
	}{
		{"nothing", true, func(*corev1.Pod) {}},
		{"label value", true, func(p *corev1.Pod) { p.Labels["app"] = "" }},
		{"annotation value", true, func(p *corev1.Pod) { p.Annotations["index"] = "7" }},
		{"claim", true, func(p *corev1.Pod) { p.Spec.Volumes[0].PersistentVolumeClaim.ClaimName = "other" }},
		{"host name", true, func(p *corev1.Pod) { p.Spec.Hostname = "other" }},
		{"label", false, func(p *corev1.Pod) { p.Labels["new"] = "x" }},
		{"no labels", false, func(p *corev1.Pod) { p.Labels = nil }},
		{"annotation", false, func(p *corev1.Pod) { p.Annotations["new"] = "x" }},
		{"owner", true, func(p *corev1.Pod) { p.OwnerReferences[0].UID, p.OwnerReferences[0].Name = "another", "web-2" }},
		{"prefix of the name", true, func(p *corev1.Pod) { p.GenerateName = "other-" }},
		{"owner's kind", false, func(p *corev1.Pod) { p.OwnerReferences[0].Kind = "Job" }},
		{"owner with an odd identity", false, func(p *corev1.Pod) { p.OwnerReferences[0].UID = "a\"b" }},
		{"two owners", false, func(p *corev1.Pod) {
			p.OwnerReferences = append(p.OwnerReferences, metav1.OwnerReference{APIVersion: "v1", Kind: "ConfigMap", Name: "c", UID: "c"})
		}},
		{"no owner", false, func(p *corev1.Pod) { p.OwnerReferences = nil }},
		{"finalizer", false, func(p *corev1.Pod) { p.Finalizers = []string{"example.com/f"} }},
		{"no host name", false, func(p *corev1.Pod) { p.Spec.Hostname = "" }},
		{"volume's name", false, func(p *corev1.Pod) { p.Spec.Volumes[0].Name = "other" }},
		{"read-only claim", false, func(p *corev1.Pod) { p.Spec.Volumes[0].PersistentVolumeClaim.ReadOnly = true }},
		{"another kind of volume", false, func(p *corev1.Pod) {
			p.Spec.Volumes[0].VolumeSource = corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}
		}},
		{"container's name", false, func(p *corev1.Pod) { p.Spec.Containers[0].Name = "other" }},
		{"port", false, func(p *corev1.Pod) { p.Spec.Containers[0].Ports[0].ContainerPort = 81 }},
		{"variable without a value", false, func(p *corev1.Pod) { p.Spec.Containers[0].Env[0].Value = "" }},
		{"toleration", false, func(p *corev1.Pod) { p.Spec.Tolerations = nil }},
		{"no requests", false, func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Requests = nil }},
		{"scheduling gate", false, func(p *corev1.Pod) { p.Spec.SchedulingGates = []corev1.PodSchedulingGate{{Name: "example.com/g"}} }},
	} {
		t.Run(edit.name, func(t *testing.T) {
			pod := directPod("shapes", fmt.Sprint("p", i))
			edit.edit(pod)
			got := createPod(ctx, t, c, d, pod).ManagedFields[0].FieldsV1.String()
			key, ok := shapeOf(pod)
			if !ok || (key == shape) != edit.same {
				t.Errorf("the same shape: %v, want %v", key == shape, edit.same)
			}
			if key != shape {
				return
			}
			// What is made of base's managed fields must be what the API makes of this pod's.
			d := &Direct{parts: d.parts, user: d.user, opened: d.opened}
			d.Created(base, created)
			made, ok := d.shapes.fields(pod)
			if !ok || made.FieldsV1.String() != got {
				t.Errorf("one shape, but other managed fields:\n%s\nwant\n%s", made.FieldsV1, got)
			}
		})
	}
}

// TestDirectHoldsWhatHTTPDoes: admission, validation and conditions refuse with the same words.
func TestDirectHoldsWhatHTTPDoes(t *testing.T) {
	ctx, c, d := directFixture(t, "direct-refused")
	createPod(ctx, t, c, d, directPod("direct-refused", "first"))
	compare := func(t *testing.T, name string, obj runtime.Object, byHTTP error) {
		t.Helper()
		done, err := d.Create(ctx, obj)
		switch {
		case !done:
			t.Errorf("%s: left to HTTP", name)
		case err == nil || byHTTP == nil:
			t.Errorf("%s: %v, by HTTP %v; want refusals", name, err, byHTTP)
		case apierrors.ReasonForError(err) != apierrors.ReasonForError(byHTTP) || err.Error() != byHTTP.Error():
			t.Errorf("%s:\n%v (%s), by HTTP\n%v (%s)", name, err, apierrors.ReasonForError(err), byHTTP, apierrors.ReasonForError(byHTTP))
		}
	}
	create := func(pod *corev1.Pod) error {
		_, err := c.CoreV1().Pods(pod.Namespace).Create(ctx, pod, metav1.CreateOptions{})
		return err
	}
	again := directPod("direct-refused", "first")
	compare(t, "exists", again, create(again))
	wrong := directPod("direct-refused", "Not_A_Name")
	compare(t, "invalid", wrong, create(wrong))

	quota := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: "q"}, Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourcePods: resource.MustParse("1")}}}
	quota, err := c.CoreV1().ResourceQuotas("direct-refused").Create(ctx, quota, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	quota.Status = corev1.ResourceQuotaStatus{Hard: quota.Spec.Hard, Used: corev1.ResourceList{corev1.ResourcePods: resource.MustParse("1")}}
	if _, err := c.CoreV1().ResourceQuotas("direct-refused").UpdateStatus(ctx, quota, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	over := directPod("direct-refused", "over")
	for create(over) == nil { // until the plugin has seen the quota
		if err := c.CoreV1().Pods(over.Namespace).Delete(ctx, over.Name, *metav1.NewDeleteOptions(0)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	compare(t, "over quota", over, create(over))

	bind := func(b *corev1.Binding) error {
		return c.CoreV1().Pods(b.Namespace).Bind(ctx, b, metav1.CreateOptions{})
	}
	binding := func(pod, uid string) *corev1.Binding {
		return &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Namespace: "direct-refused", Name: pod, UID: types.UID(uid)}, Target: corev1.ObjectReference{Kind: "Node", Name: "n1"}}
	}
	compare(t, "bind what is not there", binding("none", ""), bind(binding("none", "")))
	compare(t, "bind another's pod", binding("first", "someone"), bind(binding("first", "someone")))
	if done, err := d.Create(ctx, binding("first", "")); !done || err != nil {
		t.Fatalf("bind: %v, %v", done, err)
	}
	pod, err := c.CoreV1().Pods("direct-refused").Get(ctx, "first", metav1.GetOptions{})
	if err != nil || pod.Spec.NodeName != "n1" || len(pod.Status.Conditions) != 1 || pod.Status.Conditions[0].Type != corev1.PodScheduled || pod.Status.Conditions[0].Status != corev1.ConditionTrue {
		t.Errorf("bound pod: %v %v, %v", pod.Spec.NodeName, pod.Status.Conditions, err)
	}
	compare(t, "bind twice", binding("first", ""), bind(binding("first", "")))

	if done, err := d.Create(ctx, &corev1.ConfigMap{}); done || err != nil {
		t.Errorf("an object of another kind: %v, %v", done, err)
	}
}
