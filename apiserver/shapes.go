package apiserver

import (
	"bytes"
	"crypto/sha256"
	"slices"
	"strings"
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
	known map[[sha256.Size]byte]knownFields
}

// knownFields are the managed fields of an object whose only owner has a key in them.
type knownFields struct {
	entry metav1.ManagedFieldsEntry
	owner string
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

// shapeOfPod empties what tells the pods of one workload apart, and those of workloads
// that are alike: the namespace, the names, the values of labels and annotations, the
// host's name, which claim a volume is, and the owner, if there is one whose key in the
// managed fields can be told (see ownerKey).
func shapeOfPod(p corev1.Pod) *corev1.Pod {
	p.Name, p.Namespace = "", ""
	blank(&p.GenerateName)
	if ownerKey(&p) != "" {
		owner := p.OwnerReferences[0]
		blank(&owner.Name)
		owner.UID = ""
		p.OwnerReferences = []metav1.OwnerReference{owner}
	}
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

// ownerKey is by what the managed fields name the reference to a pod's only owner, empty
// if it has none or several, or an odd one.
func ownerKey(m metav1.Object) string {
	owners := m.GetOwnerReferences()
	if len(owners) != 1 || owners[0].UID == "" || strings.Trim(string(owners[0].UID), uidLetters) != "" {
		return ""
	}
	return `"k:{\"uid\":\"` + string(owners[0].UID) + `\"}"`
}

// uidLetters are those that JSON leaves as they are.
const uidLetters = "0123456789abcdefghijklmnopqrstuvwxyz-"

// withOwner returns managed fields in which another owner's key stands.
func withOwner(fields *metav1.FieldsV1, old, key string) *metav1.FieldsV1 {
	if fields == nil || old == key {
		return fields
	}
	return &metav1.FieldsV1{Raw: bytes.Replace(fields.Raw, []byte(old), []byte(key), 1)}
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
func (s *shapes) fields(obj object) (metav1.ManagedFieldsEntry, bool) {
	key, ok := shapeOf(obj)
	if !ok {
		return metav1.ManagedFieldsEntry{}, false
	}
	s.mu.Lock()
	k, ok := s.known[key]
	s.mu.Unlock()
	now := metav1.Now().Rfc3339Copy()
	entry := k.entry
	entry.Time = &now
	entry.FieldsV1 = withOwner(entry.FieldsV1, k.owner, ownerKey(obj))
	return entry, ok
}

// learn remembers the managed fields of an object that was created. Those that somebody
// else, a webhook, had a part in are left out.
func (s *shapes) learn(sent, created runtime.Object) {
	m, err := meta.Accessor(created)
	if err != nil || len(m.GetManagedFields()) != 1 {
		return
	}
	entry, owner := m.GetManagedFields()[0], ownerKey(m)
	key, ok := shapeOf(sent)
	if !ok || entry.Operation != metav1.ManagedFieldsOperationUpdate || entry.Subresource != "" || entry.FieldsV1 == nil ||
		owner != "" && bytes.Count(entry.FieldsV1.Raw, []byte(owner)) != 1 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil || len(s.known) >= keepShapes {
		s.known = map[[sha256.Size]byte]knownFields{}
	}
	s.known[key] = knownFields{entry, owner}
}
