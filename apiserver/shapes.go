package apiserver

import (
	"crypto/sha256"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// keepShapes is how many shapes are remembered. Each is as large as a pod's managed
// fields, some KiB.
const keepShapes = 256

// shapes remembers the managed fields of objects by which fields these have. The zero
// value is ready to use.
type shapes struct {
	mu    sync.Mutex
	known map[[sha256.Size]byte]metav1.ManagedFieldsEntry
}

// shapeOf is equal for objects that have the same fields, so that whoever creates them
// owns the same ones. It is a digest of the object without the contents of those fields in
// which the like ones differ and that are part of no list's keys.
func shapeOf(obj runtime.Object) (key [sha256.Size]byte, ok bool) {
	var raw []byte
	var err error
	switch o := obj.(type) {
	case *corev1.Pod:
		raw, err = shapeOfPod(*o).Marshal() // maps are written in the order of their keys
	case *corev1.Event:
		raw, err = shapeOfEvent(*o).Marshal()
	default:
		return key, false
	}
	if err != nil {
		return key, false
	}
	return sha256.Sum256(raw), true
}

// shapeOfPod empties what tells the pods of one workload apart: the name, the values of
// labels and annotations, the host's name, and which claim a volume is.
func shapeOfPod(p corev1.Pod) *corev1.Pod {
	p.Name = ""
	p.Labels, p.Annotations = emptied(p.Labels), emptied(p.Annotations)
	blank(&p.Spec.Hostname)
	p.Spec.Volumes = slices.Clone(p.Spec.Volumes)
	for i := range p.Spec.Volumes {
		if c := p.Spec.Volumes[i].PersistentVolumeClaim; c != nil {
			claim := *c
			blank(&claim.ClaimName)
			p.Spec.Volumes[i].PersistentVolumeClaim = &claim
		}
	}
	return &p
}

// shapeOfEvent empties what an event says.
func shapeOfEvent(e corev1.Event) *corev1.Event {
	for _, s := range []*string{&e.Name, &e.Namespace, &e.Reason, &e.Message, &e.Type, &e.Action, &e.Source.Component, &e.Source.Host,
		&e.ReportingController, &e.ReportingInstance, &e.InvolvedObject.Kind, &e.InvolvedObject.APIVersion, &e.InvolvedObject.Namespace,
		&e.InvolvedObject.Name, (*string)(&e.InvolvedObject.UID), &e.InvolvedObject.ResourceVersion, &e.InvolvedObject.FieldPath} {
		blank(s)
	}
	for _, t := range []*metav1.Time{&e.FirstTimestamp, &e.LastTimestamp} {
		if !t.IsZero() {
			*t = metav1.Unix(1, 0)
		}
	}
	e.Count = min(e.Count, 1)
	return &e
}

// blank makes all contents of a field one.
func blank(s *string) {
	if *s != "" {
		*s = "x"
	}
}

// emptied is a map's keys.
func emptied(m map[string]string) map[string]string {
	if m == nil {
		return nil
	}
	out := make(map[string]string, len(m))
	for k := range m {
		out[k] = ""
	}
	return out
}

// fields are the managed fields of an object that is created now.
func (s *shapes) fields(obj runtime.Object) (metav1.ManagedFieldsEntry, bool) {
	key, ok := shapeOf(obj)
	if !ok {
		return metav1.ManagedFieldsEntry{}, false
	}
	s.mu.Lock()
	entry, ok := s.known[key]
	s.mu.Unlock()
	now := metav1.Now().Rfc3339Copy()
	entry.Time = &now
	return entry, ok
}

// learn remembers the managed fields of an object that was created. Those that somebody
// else, a webhook, had a part in are left out.
func (s *shapes) learn(sent, created runtime.Object) {
	m, err := meta.Accessor(created)
	if err != nil || len(m.GetManagedFields()) != 1 {
		return
	}
	entry := m.GetManagedFields()[0]
	key, ok := shapeOf(sent)
	if !ok || entry.Operation != metav1.ManagedFieldsOperationUpdate || entry.Subresource != "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil || len(s.known) >= keepShapes {
		s.known = map[[sha256.Size]byte]metav1.ManagedFieldsEntry{}
	}
	s.known[key] = entry
}
