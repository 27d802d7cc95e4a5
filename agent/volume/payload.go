package volume

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/api/v1/resource"
	"k8s.io/kubernetes/pkg/fieldpath"
)

// entry is one file of a volume that is made of API data.
type entry struct {
	data []byte
	mode int32
	uid  int // owner, -1: root
}

// payload collects the files of one volume.
type payload struct {
	ctx     context.Context
	manager *Manager
	pod     *corev1.Pod
	volume  string // its name
	files   map[string]entry
	fields  map[string][]byte // of the downward API, by path: each is made once
	left    *int64            // how much of memory the pod's volumes may still take
	refresh time.Time
}

// A volume of API data is in the node's memory, and a few bytes of a pod can ask for
// the same key, or the same annotation, as thousands of files. So all of a pod may
// take a part of what the node gives to pods, and no less than that of a pod with
// many full ConfigMaps.
const (
	apiRoomShare = 32
	leastAPIRoom = 64 << 20
	// maxPath is Linux' bound.
	maxPath = 4096
)

// apiRoom is how much memory one pod's volumes of API data may take.
func (m *Manager) apiRoom() int64 {
	if m.cfg.Allocatable == nil {
		return leastAPIRoom
	}
	allocatable := m.cfg.Allocatable()
	return max(leastAPIRoom, allocatable.Memory().Value()/apiRoomShare)
}

func (p *payload) add(path string, e entry) error {
	if !filepath.IsLocal(path) || strings.HasPrefix(path, "..") {
		return fmt.Errorf("path %q must be relative and must not begin with \"..\"", path)
	}
	if len(path) > maxPath {
		return fmt.Errorf("path %.64q… has %d bytes, %d are possible", path, len(path), maxPath)
	}
	if *p.left -= e.size() + page*int64(strings.Count(path, "/")); *p.left < 0 {
		return fmt.Errorf("the pod's volumes of ConfigMaps, Secrets, tokens and fields would take more than the %d MiB of this node's memory that a pod may have of it", p.manager.apiRoom()>>20)
	}
	if p.files == nil {
		p.files = map[string]entry{}
	}
	p.files[filepath.Clean(path)] = e
	return nil
}

func optional(o *bool) bool { return o != nil && *o }

func (p *payload) configMap(name string, items []corev1.KeyToPath, opt *bool, mode int32) error {
	cm, ok := p.manager.cfg.ConfigMap(p.pod.Namespace, name)
	if !ok {
		if optional(opt) {
			return nil
		}
		return fmt.Errorf("configmap %q not found", name)
	}
	data := make(map[string][]byte, len(cm.Data)+len(cm.BinaryData))
	for k, v := range cm.Data {
		data[k] = []byte(v)
	}
	for k, v := range cm.BinaryData {
		data[k] = v
	}
	return p.keys("configmap", name, data, items, optional(opt), mode)
}

func (p *payload) secret(name string, items []corev1.KeyToPath, opt *bool, mode int32) error {
	s, ok := p.manager.cfg.Secret(p.pod.Namespace, name)
	if !ok {
		if optional(opt) {
			return nil
		}
		return fmt.Errorf("secret %q not found", name)
	}
	return p.keys("secret", name, s.Data, items, optional(opt), mode)
}

func (p *payload) keys(kind, name string, data map[string][]byte, items []corev1.KeyToPath, opt bool, mode int32) error {
	if len(items) == 0 {
		for k, v := range data {
			if err := p.add(k, entry{data: v, mode: mode, uid: -1}); err != nil {
				return fmt.Errorf("%s %q: %w", kind, name, err)
			}
		}
		return nil
	}
	for _, item := range items {
		v, ok := data[item.Key]
		if !ok {
			if opt {
				continue
			}
			return fmt.Errorf("%s %q has no key %q", kind, name, item.Key)
		}
		e := entry{data: v, mode: mode, uid: -1}
		if item.Mode != nil {
			e.mode = *item.Mode
		}
		if err := p.add(item.Path, e); err != nil {
			return fmt.Errorf("%s %q: %w", kind, name, err)
		}
	}
	return nil
}

func (p *payload) downward(items []corev1.DownwardAPIVolumeFile, mode int32) error {
	for _, item := range items {
		e := entry{mode: mode, uid: -1}
		if item.Mode != nil {
			e.mode = *item.Mode
		}
		var err error
		switch {
		case item.FieldRef != nil:
			e.data, err = p.field(item.FieldRef.FieldPath)
		case item.ResourceFieldRef != nil:
			var text string
			text, err = resource.ExtractResourceValueByContainerNameAndNodeAllocatable(
				item.ResourceFieldRef, p.pod, item.ResourceFieldRef.ContainerName, p.manager.cfg.Allocatable())
			e.data = []byte(text)
		}
		if err != nil {
			return fmt.Errorf("downward API file %q: %w", item.Path, err)
		}
		if err := p.add(item.Path, e); err != nil {
			return err
		}
	}
	return nil
}

func (p *payload) field(path string) ([]byte, error) {
	if data, ok := p.fields[path]; ok {
		return data, nil
	}
	text, err := fieldpath.ExtractFieldPathAsString(p.pod, path)
	if err != nil {
		return nil, err
	}
	if p.fields == nil {
		p.fields = map[string][]byte{}
	}
	p.fields[path] = []byte(text)
	return p.fields[path], nil
}

func (p *payload) projected(src *corev1.ProjectedVolumeSource) error {
	m := mode(src.DefaultMode)
	for i := range src.Sources {
		s := &src.Sources[i]
		var err error
		switch {
		case s.ConfigMap != nil:
			err = p.configMap(s.ConfigMap.Name, s.ConfigMap.Items, s.ConfigMap.Optional, m)
		case s.Secret != nil:
			err = p.secret(s.Secret.Name, s.Secret.Items, s.Secret.Optional, m)
		case s.DownwardAPI != nil:
			err = p.downward(s.DownwardAPI.Items, m)
		case s.ServiceAccountToken != nil:
			err = p.token(s.ServiceAccountToken, m)
		case s.ClusterTrustBundle != nil:
			err = p.trustBundle(s.ClusterTrustBundle, m)
		case s.PodCertificate != nil:
			err = p.certificate(s.PodCertificate, i, m)
		default:
			err = fmt.Errorf("projected source %d is %w", i, ErrUnsupported)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
