package workload

import (
	"maps"
	"slices"
	"strconv"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
)

const (
	// templateGenerationLabel is on pods for those who look for it, and tells pods that
	// were made before there were hashes.
	templateGenerationLabel = "pod-template-generation"

	// failuresAnnotation counts on a pod how many before it failed on its node in a row,
	// so that the next leader keeps the pace too.
	failuresAnnotation = "timonel.io/daemon-failures"

	// A failed pod is replaced at once, one that replaces it after firstHold if it fails
	// as well, and so on, doubled up to lastDaemonHold. The count begins anew with a pod
	// that has run for failuresForgotten, and with another template.
	lastDaemonHold    = 15 * time.Minute
	failuresForgotten = 2 * lastDaemonHold

	// firstBatch is how many pods are created before it is known that they can be. Each
	// pass creates as many more as twice those there are.
	firstBatch = 8
)

// manage creates pods on the nodes that have none and are to have one, and deletes
// those that are not to be there, have ended or are too many.
func (d *daemons) manage() {
	var need []string
	var remove []*corev1.Pod
	replace := map[string]*corev1.Pod{} // failed pods that others follow, by name
	for _, node := range d.nodes {
		pods, fits := d.onNode[node.Name], d.fits[node.Name]
		switch {
		case fits.run && len(pods) == 0:
			need = append(need, node.Name)
		case fits.stay:
			running, ended, wait := d.ended(node.Name, pods)
			remove = append(remove, ended...)
			switch {
			case len(running) > 0 || !fits.run || wait:
			case len(ended) > 0:
				replace[ended[0].Name] = ended[0]
			case d.surges():
				need = append(need, node.Name) // those there are being deleted
			}
			remove = append(remove, d.surplus(running)...)
		default:
			remove = append(remove, alive(pods)...)
		}
	}
	// The scheduler never binds what is aimed at a node that is gone, so that nobody else
	// deletes it.
	for name, pods := range d.onNode {
		if _, there := d.fits[name]; there {
			continue
		}
		for _, pod := range alive(pods) {
			if pod.Spec.NodeName == "" {
				remove = append(remove, pod)
			}
		}
	}
	d.sync(remove, need, replace)
}

func alive(pods []*corev1.Pod) []*corev1.Pod {
	return slices.DeleteFunc(slices.Clone(pods), func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil })
}

// ended tells the pods of a node that run, or are about to, from those that have ended
// and are to be deleted now. wait says that one failed too soon after others.
func (d *daemons) ended(node string, pods []*corev1.Pod) (running, ended []*corev1.Pod, wait bool) {
	event := func(kind, reason, format string, pod *corev1.Pod) {
		d.result.Events = append(d.result.Events, *reconcile.NewEvent(reconcile.DaemonSetKind, d.ds, kind, reason, format, pod.Namespace, pod.Name, node))
	}
	for _, pod := range alive(pods) {
		switch pod.Status.Phase {
		case corev1.PodFailed:
			if until := d.holdUntil(pod); until.After(d.in.Now) {
				wait = true
				d.result.At(until)
				continue
			}
			event(corev1.EventTypeWarning, "FailedDaemonPod", "Found failed daemon pod %s/%s on node %s, will try to kill it", pod)
			ended = append(ended, pod)
		case corev1.PodSucceeded:
			event(corev1.EventTypeNormal, "SucceededDaemonPod", "Found succeeded daemon pod %s/%s on node %s, will try to delete it", pod)
			ended = append(ended, pod)
		default:
			running = append(running, pod)
		}
	}
	return running, ended, wait
}

// failures is how many pods failed on a node in a row before this one.
func (d *daemons) failures(pod *corev1.Pod) int {
	if !d.updated(pod) || d.in.Now.Sub(pod.CreationTimestamp.Time) > failuresForgotten {
		return 0
	}
	n, _ := strconv.Atoi(pod.Annotations[failuresAnnotation])
	return max(0, n)
}

// holdUntil is when a failed pod may be replaced.
func (d *daemons) holdUntil(pod *corev1.Pod) time.Time {
	n := d.failures(pod)
	if n == 0 {
		return time.Time{}
	}
	hold := lastDaemonHold
	if n <= 10 { // 2^10 seconds are more than lastDaemonHold
		hold = min(firstHold<<(n-1), lastDaemonHold)
	}
	// Creation times are whole seconds, cut off: one more, or the first hold might be none.
	return pod.CreationTimestamp.Add(hold + time.Second)
}

// surplus returns which of a node's running pods are too many: all but the oldest, and
// while pods surge, all but one that is old and ready and one that is to take its place.
func (d *daemons) surplus(running []*corev1.Pod) []*corev1.Pod {
	if len(running) <= 1 {
		return nil
	}
	running = oldestFirst(running)
	if !d.surges() {
		return running[1:]
	}
	var out []*corev1.Pod
	var fresh, old *corev1.Pod
	for _, pod := range running {
		switch isFresh := pod.Labels[appsv1.DefaultDaemonSetUniqueLabelKey] == d.hash; {
		case isFresh && fresh == nil:
			fresh = pod
		case !isFresh && old == nil:
			old = pod
		default:
			out = append(out, pod)
		}
	}
	if fresh != nil && old != nil && (reconcile.ReadyCondition(old) == nil || d.available(fresh)) {
		out = append(out, old)
	}
	return out
}

// sync deletes pods and creates others on nodes. Those that replace a failed one are
// created once that is deleted.
func (d *daemons) sync(remove []*corev1.Pod, need []string, replace map[string]*corev1.Pod) {
	if len(remove) == 0 && len(need) == 0 {
		return
	}
	burst := d.Burst
	if burst == 0 {
		burst = 250
	}
	template := d.template()
	batch := min(burst, max(firstBatch, 2*len(d.pods)), MostPods(template))
	if d.in.Refused(reconcile.VerbCreate, reconcile.PodsResource) != nil {
		batch = 1 // see whether one goes through before trying them all again
	}
	names := reconcile.NewNames(d.in, d.ds)
	create := func(node string, failures int) reconcile.Request {
		pod := PodFromTemplate(d.ds, reconcile.DaemonSetKind, template, names.Next())
		aim(&pod.Spec, node)
		if failures > 0 {
			metav1.SetMetaDataAnnotation(&pod.ObjectMeta, failuresAnnotation, strconv.Itoa(failures))
		}
		return CreatePod(reconcile.DaemonSetKind, d.ds, pod)
	}
	for _, pod := range remove[:min(len(remove), burst)] {
		c := DeletePod(reconcile.DaemonSetKind, d.ds, pod)
		if failed := replace[pod.Name]; failed != nil && failed.Status.Phase == corev1.PodFailed && batch > 0 {
			batch--
			c.Then = []reconcile.Request{create(targetNode(pod), d.failures(pod)+1)}
		}
		d.result.Add(c)
	}
	for _, node := range need[:min(len(need), batch)] {
		d.result.Add(create(node, 0))
	}
}

// template is what pods are made of.
func (d *daemons) template() *corev1.PodTemplateSpec {
	t := d.ds.Spec.Template
	t.Spec.Tolerations = daemonTolerations(&t.Spec)
	t.Labels = maps.Clone(t.Labels)
	if t.Labels == nil {
		t.Labels = map[string]string{}
	}
	t.Labels[appsv1.DefaultDaemonSetUniqueLabelKey] = d.hash
	if d.generation != "" {
		t.Labels[templateGenerationLabel] = d.generation
	}
	return &t
}
