package desired

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/hostile"
)

// Kinds of objects that pods refer to, as they are named on the stream.
const (
	KindConfigMap      = "ConfigMap"
	KindSecret         = "Secret"
	KindServiceAccount = "ServiceAccount"
	KindClaim          = "PersistentVolumeClaim"
	KindVolume         = "PersistentVolume" // of a pod's claim, or the node's own and being deleted
	KindTrustBundle    = "ClusterTrustBundle"
	KindRuntimeClass   = "RuntimeClass"
	KindPodCertificate = "PodCertificateRequest" // that this node made for a pod
	KindDriver         = "CSIDriver"             // of a pod's volume
	KindAttachment     = "VolumeAttachment"      // of a pod's volume to this node
)

// object is what the generated API types have in common here.
type object interface {
	Marshal() ([]byte, error)
	Unmarshal([]byte) error
	GetNamespace() string
	GetName() string
	GetUID() types.UID
	GetResourceVersion() string
}

// key names one object and is its path below the store's folder.
type key string

// kind of the object that a key below objects/ names.
func (k key) kind() string { return filepath.Base(filepath.Dir(filepath.Dir(string(k)))) }

func podKey(uid types.UID) key      { return key(filepath.Join("pods", string(uid))) }
func policiesKey(uid types.UID) key { return key(filepath.Join("policies", string(uid))) }
func statusKey(uid types.UID) key   { return key(filepath.Join("status", string(uid))) }

// clusterNamespace is the folder of objects without a namespace; no namespace is called so.
const clusterNamespace = "_"

func objectKey(kind, ns, name string) key {
	return key(filepath.Join("objects", kind, cmp.Or(ns, clusterNamespace), name))
}
func newObject(kind string) (object, error) {
	switch kind {
	case KindConfigMap:
		return &corev1.ConfigMap{}, nil
	case KindSecret:
		return &corev1.Secret{}, nil
	case KindServiceAccount:
		return &corev1.ServiceAccount{}, nil
	case KindClaim:
		return &corev1.PersistentVolumeClaim{}, nil
	case KindVolume:
		return &corev1.PersistentVolume{}, nil
	case KindTrustBundle:
		return &certificatesv1.ClusterTrustBundle{}, nil
	case KindRuntimeClass:
		return &nodev1.RuntimeClass{}, nil
	case KindPodCertificate:
		return &certificatesv1.PodCertificateRequest{}, nil
	case KindDriver:
		return &storagev1.CSIDriver{}, nil
	case KindAttachment:
		return &storagev1.VolumeAttachment{}, nil
	}
	return nil, fmt.Errorf("objects of kind %q are not known to this agent; is it older than the controller?", kind)
}

// Observer hears about changes, from the goroutine that makes them. A nil
// function is not called.
type Observer struct {
	PodSet        func(*corev1.Pod)
	PodRemoved    func(*corev1.Pod)
	ObjectChanged func(kind, namespace, name string)
	// Synced is called after each Synced: the pods are then the whole truth. anew says
	// that it is the first since a stream began.
	Synced func(anew bool)
}

// position is where in the cluster's history this store is.
type position struct {
	Epoch    string `json:"epoch"`
	Revision int64  `json:"revision"`
}

// Store is safe for concurrent use. Objects that it returns are shared and must
// not be changed.
type Store struct {
	dir string
	log *slog.Logger

	mu       sync.Mutex
	pods     map[types.UID]*corev1.Pod
	objects  map[key]object
	digests  map[key]digest                  // of pods and objects as they came
	policies map[types.UID]int64             // as in SetPod, but for 0
	statuses map[types.UID]*corev1.PodStatus // last one reported, by pod
	pos      position
	whole    bool         // a full list was received since this process began
	stray    map[key]bool // files that were found and could not be read
	begun    bool         // a stream, and nothing was synced since
	listing  map[key]bool // what a full list has named so far, nil outside of one
	observer Observer

	writer *writer
}

// Open reads the store of dir, which is made when missing. Files that cannot be
// read are as if they were not there: the first connection brings a full list.
func Open(dir string, log *slog.Logger) (*Store, error) {
	s := &Store{
		dir: dir, log: log,
		pods: map[types.UID]*corev1.Pod{}, objects: map[key]object{}, digests: map[key]digest{},
		policies: map[types.UID]int64{}, statuses: map[types.UID]*corev1.PodStatus{}, stray: map[key]bool{},
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of the desired state: %w", err)
	}
	found, err := s.load()
	if err != nil {
		return nil, err
	}
	if s.writer, err = newWriter(dir, found, log); err != nil {
		return nil, err
	}
	return s, nil
}

// Observe sets who hears about changes. Call it before the first change.
func (s *Store) Observe(o Observer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.observer = o
}

// Close writes what is left to write and returns why that failed, if it did.
func (s *Store) Close() error { return s.writer.close() }

// Position returns the cluster id and the revision that was reached.
func (s *Store) Position() (epoch string, revision int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pos.Epoch, s.pos.Revision
}

// Begin says that a stream starts: with full, everything that is not named
// until Synced is gone.
func (s *Store) Begin(epoch string, full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pos.Epoch, s.begun = epoch, true
	s.listing = nil
	if full {
		s.listing = map[key]bool{}
		s.pos.Revision = 0
	}
}

// SetPod takes a new or changed pod, for which a network policy may hold as of a revision;
// 0: none does.
func (s *Store) SetPod(raw []byte, revision, policies int64) error {
	pod := &corev1.Pod{}
	if err := pod.Unmarshal(raw); err != nil {
		return fmt.Errorf("decode a pod from the controller: %w", err)
	}
	if pod.UID == "" {
		return fmt.Errorf("pod %s/%s from the controller has no uid", pod.Namespace, pod.Name)
	}
	s.mu.Lock()
	k := podKey(pod.UID)
	s.pods[pod.UID], s.digests[k] = pod, digestOf(raw)
	known := s.policies[pod.UID]
	if policies != 0 {
		s.policies[pod.UID] = policies
	} else {
		delete(s.policies, pod.UID)
	}
	s.mark(k, revision)
	notify := s.observer.PodSet
	s.mu.Unlock()
	switch { // first, so that no pod is on the disk without
	case policies != 0 && policies != known:
		s.writer.put(policiesKey(pod.UID), strconv.AppendInt(nil, policies, 10))
	case policies == 0 && known != 0:
		s.writer.remove(policiesKey(pod.UID))
	}
	s.writer.put(k, raw)
	if notify != nil {
		notify(pod)
	}
	return nil
}

// RemovePod forgets a pod.
func (s *Store) RemovePod(uid types.UID, revision int64) {
	s.mu.Lock()
	pod := s.pods[uid]
	delete(s.pods, uid)
	delete(s.digests, podKey(uid))
	s.forgetPolicies(uid)
	s.advance(revision)
	notify := s.observer.PodRemoved
	s.mu.Unlock()
	s.writer.remove(podKey(uid))
	if pod != nil && notify != nil {
		notify(pod)
	}
}

// SetObject takes a new or changed ConfigMap, Secret or ServiceAccount.
func (s *Store) SetObject(kind string, raw []byte, revision int64) error {
	obj, err := newObject(kind)
	if err != nil {
		return err
	}
	if err := obj.Unmarshal(raw); err != nil {
		return fmt.Errorf("decode a %s from the controller: %w", kind, err)
	}
	k := objectKey(kind, obj.GetNamespace(), obj.GetName())
	s.mu.Lock()
	s.objects[k], s.digests[k] = obj, digestOf(raw)
	s.mark(k, revision)
	notify := s.observer.ObjectChanged
	s.mu.Unlock()
	s.writer.put(k, raw)
	if notify != nil {
		notify(kind, obj.GetNamespace(), obj.GetName())
	}
	return nil
}

// RemoveObject forgets a ConfigMap, Secret or ServiceAccount.
func (s *Store) RemoveObject(kind, namespace, name string, revision int64) {
	k := objectKey(kind, namespace, name)
	s.mu.Lock()
	_, had := s.objects[k]
	delete(s.objects, k)
	delete(s.digests, k)
	s.advance(revision)
	notify := s.observer.ObjectChanged
	s.mu.Unlock()
	s.writer.remove(k)
	if had && notify != nil {
		notify(kind, namespace, name)
	}
}

// Synced ends a list or a batch of changes: everything up to revision is here.
func (s *Store) Synced(revision int64) {
	var gonePods []*corev1.Pod
	var goneObjects []object
	var goneKinds []string
	s.mu.Lock()
	if s.listing != nil {
		for uid, pod := range s.pods {
			if k := podKey(uid); !s.listing[k] {
				delete(s.pods, uid)
				delete(s.digests, k)
				s.writer.remove(k)
				s.forgetPolicies(uid)
				gonePods = append(gonePods, pod)
			}
		}
		for k, obj := range s.objects {
			if !s.listing[k] {
				delete(s.objects, k)
				delete(s.digests, k)
				s.writer.remove(k)
				goneObjects = append(goneObjects, obj)
				goneKinds = append(goneKinds, k.kind())
			}
		}
		for k := range s.stray {
			if !s.listing[k] {
				s.writer.remove(k)
			}
		}
		clear(s.stray)
		s.listing, s.whole = nil, true
	}
	s.pos.Revision = revision // the state may have gone back
	pos, observer, anew := s.pos, s.observer, s.begun
	s.begun = false
	s.mu.Unlock()

	raw, _ := json.Marshal(pos) // two plain fields
	s.writer.position(raw)
	for _, pod := range gonePods {
		if observer.PodRemoved != nil {
			observer.PodRemoved(pod)
		}
	}
	for i, obj := range goneObjects {
		if observer.ObjectChanged != nil {
			observer.ObjectChanged(goneKinds[i], obj.GetNamespace(), obj.GetName())
		}
	}
	if observer.Synced != nil {
		observer.Synced(anew)
	}
}

// mark notes that k is part of the list being received.
func (s *Store) mark(k key, revision int64) {
	if s.listing != nil {
		s.listing[k] = true
	}
	s.advance(revision)
}

// advance moves the revision forward. While a list is being received it stays
// at zero: half a list is nothing to resume from.
func (s *Store) advance(revision int64) {
	if s.listing == nil && revision > s.pos.Revision {
		s.pos.Revision = revision
	}
}

// Pods returns all pods of the node.
func (s *Store) Pods() []*corev1.Pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*corev1.Pod, 0, len(s.pods))
	for _, pod := range s.pods {
		out = append(out, pod)
	}
	return out
}

// Pod returns one pod.
func (s *Store) Pod(uid types.UID) (*corev1.Pod, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	pod, ok := s.pods[uid]
	return pod, ok
}

// ConfigMap returns one that a pod refers to, as Secret and ServiceAccount do.
func (s *Store) ConfigMap(namespace, name string) (*corev1.ConfigMap, bool) {
	obj, ok := s.object(KindConfigMap, namespace, name).(*corev1.ConfigMap)
	return obj, ok
}

// Secret returns a secret that a pod refers to.
func (s *Store) Secret(namespace, name string) (*corev1.Secret, bool) {
	obj, ok := s.object(KindSecret, namespace, name).(*corev1.Secret)
	return obj, ok
}

// ServiceAccount returns a service account that a pod runs as.
func (s *Store) ServiceAccount(namespace, name string) (*corev1.ServiceAccount, bool) {
	obj, ok := s.object(KindServiceAccount, namespace, name).(*corev1.ServiceAccount)
	return obj, ok
}

// PersistentVolumeClaim returns a claim that a pod uses.
func (s *Store) PersistentVolumeClaim(namespace, name string) (*corev1.PersistentVolumeClaim, bool) {
	obj, ok := s.object(KindClaim, namespace, name).(*corev1.PersistentVolumeClaim)
	return obj, ok
}

// PersistentVolume returns a volume that a pod's claim has, or that is this node's to delete.
func (s *Store) PersistentVolume(name string) (*corev1.PersistentVolume, bool) {
	obj, ok := s.object(KindVolume, "", name).(*corev1.PersistentVolume)
	return obj, ok
}

// RuntimeClass returns one that a pod names.
func (s *Store) RuntimeClass(name string) (*nodev1.RuntimeClass, bool) {
	obj, ok := s.object(KindRuntimeClass, "", name).(*nodev1.RuntimeClass)
	return obj, ok
}

// ClusterTrustBundle returns one that a pod's volume shows.
func (s *Store) ClusterTrustBundle(name string) (*certificatesv1.ClusterTrustBundle, bool) {
	obj, ok := s.object(KindTrustBundle, "", name).(*certificatesv1.ClusterTrustBundle)
	return obj, ok
}

// ClusterTrustBundles returns those of a signer that the node was told of.
func (s *Store) ClusterTrustBundles(signer string) []*certificatesv1.ClusterTrustBundle {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*certificatesv1.ClusterTrustBundle
	for _, o := range s.objects {
		if b, ok := o.(*certificatesv1.ClusterTrustBundle); ok && b.Spec.SignerName == signer {
			out = append(out, b)
		}
	}
	return out
}

// PodCertificateRequest returns one that this node made for a pod.
func (s *Store) PodCertificateRequest(namespace, name string) (*certificatesv1.PodCertificateRequest, bool) {
	obj, ok := s.object(KindPodCertificate, namespace, name).(*certificatesv1.PodCertificateRequest)
	return obj, ok
}

// CSIDriver returns what the cluster knows of a driver that a pod's volume names.
func (s *Store) CSIDriver(name string) (*storagev1.CSIDriver, bool) {
	obj, ok := s.object(KindDriver, "", name).(*storagev1.CSIDriver)
	return obj, ok
}

// VolumeAttachment returns that of a pod's volume to this node.
func (s *Store) VolumeAttachment(name string) (*storagev1.VolumeAttachment, bool) {
	obj, ok := s.object(KindAttachment, "", name).(*storagev1.VolumeAttachment)
	return obj, ok
}

// PersistentVolumes returns all that the node was told of.
func (s *Store) PersistentVolumes() []*corev1.PersistentVolume {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*corev1.PersistentVolume
	for _, o := range s.objects {
		if pv, ok := o.(*corev1.PersistentVolume); ok {
			out = append(out, pv)
		}
	}
	return out
}

func (s *Store) object(kind, namespace, name string) object {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.objects[objectKey(kind, namespace, name)]
}

// Policies is the revision as of which a network policy may hold for a pod; 0: none does.
func (s *Store) Policies(uid types.UID) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.policies[uid]
}

func (s *Store) forgetPolicies(uid types.UID) {
	if _, had := s.policies[uid]; had {
		delete(s.policies, uid)
		s.writer.remove(policiesKey(uid))
	}
}

// SetStatus keeps the last status that was computed for a pod, so that restart
// counts and verdicts outlive the agent even when no controller heard of them.
func (s *Store) SetStatus(uid types.UID, status *corev1.PodStatus) {
	raw, err := status.Marshal()
	if err != nil {
		s.log.Error("encode a pod's status", "uid", uid, "error", err)
		return
	}
	s.mu.Lock()
	s.statuses[uid] = status
	s.mu.Unlock()
	s.writer.put(statusKey(uid), raw)
}

// Status returns the last status that was computed for a pod.
func (s *Store) Status(uid types.UID) (*corev1.PodStatus, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st, ok := s.statuses[uid]
	return st, ok
}

// ForgetStatus drops the kept status of a pod that is gone.
func (s *Store) ForgetStatus(uid types.UID) {
	s.mu.Lock()
	delete(s.statuses, uid)
	s.mu.Unlock()
	s.writer.remove(statusKey(uid))
}

// load fills the store from disk and returns the keys of the files it found. What
// cannot be read is left alone until a full list says whether it is wanted.
func (s *Store) load() (found []key, err error) {
	raw, err := hostile.ReadRegular(filepath.Join(s.dir, positionFile), hostile.MaxOwn)
	if err == nil {
		err = json.Unmarshal(raw, &s.pos)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("the desired state's position cannot be read; a full list is asked for in any case", "error", err)
		s.pos = position{}
	}
	for _, top := range []string{"pods", "policies", "objects", "status"} {
		err := filepath.WalkDir(filepath.Join(s.dir, top), func(path string, d fs.DirEntry, err error) error {
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				s.log.Error("a folder of the desired state cannot be read; the node goes on without it", "folder", path, "error", err)
			}
			if err != nil || d.IsDir() {
				return nil
			}
			rel, err := filepath.Rel(s.dir, path)
			if err != nil {
				return err
			}
			found = append(found, key(rel))
			raw, err := hostile.ReadRegular(path, hostile.MaxOwn)
			if err == nil {
				err = s.loadOne(rel, raw)
			}
			if err != nil {
				s.log.Warn("a file of the desired state is damaged; the next full list replaces or removes it", "file", path, "error", err)
				s.stray[key(rel)] = true
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("read the desired state: %w", err)
		}
	}
	return found, nil
}

func (s *Store) loadOne(rel string, raw []byte) error {
	kind := filepath.Dir(rel)
	switch {
	case kind == "pods":
		pod := &corev1.Pod{}
		if err := pod.Unmarshal(raw); err != nil {
			return err
		}
		if string(pod.UID) != filepath.Base(rel) {
			return fmt.Errorf("holds the pod with uid %q", pod.UID)
		}
		s.pods[pod.UID], s.digests[key(rel)] = pod, digestOf(raw)
	case kind == "policies":
		n, err := strconv.ParseInt(string(raw), 10, 64)
		if err != nil {
			return err
		}
		s.policies[types.UID(filepath.Base(rel))] = n
	case kind == "status":
		st := &corev1.PodStatus{}
		if err := st.Unmarshal(raw); err != nil {
			return err
		}
		s.statuses[types.UID(filepath.Base(rel))] = st
	default:
		obj, err := newObject(filepath.Base(filepath.Dir(kind)))
		if err != nil {
			return err
		}
		if err := obj.Unmarshal(raw); err != nil {
			return err
		}
		if k := objectKey(filepath.Base(filepath.Dir(kind)), obj.GetNamespace(), obj.GetName()); k != key(rel) {
			return fmt.Errorf("holds the object %s/%s", obj.GetNamespace(), obj.GetName())
		}
		s.objects[key(rel)], s.digests[key(rel)] = obj, digestOf(raw)
	}
	return nil
}
