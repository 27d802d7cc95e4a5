package volume

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
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
	manager *Manager
	pod     *corev1.Pod
	podIPs  []string
	current string // path of the volume, to keep a token that is still good
	files   map[string]entry
	refresh time.Time
}

func (p *payload) add(path string, e entry) error {
	if !filepath.IsLocal(path) || strings.HasPrefix(path, "..") {
		return fmt.Errorf("path %q must be relative and must not begin with \"..\"", path)
	}
	if p.files == nil {
		p.files = map[string]entry{}
	}
	p.files[filepath.Clean(path)] = e
	return nil
}

func (p *payload) write(path string) error {
	return writeAtomic(path, p.files, fsGroup(p.pod))
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
		var text string
		var err error
		switch {
		case item.FieldRef != nil:
			text, err = fieldpath.ExtractFieldPathAsString(p.pod, item.FieldRef.FieldPath)
		case item.ResourceFieldRef != nil:
			text, err = resource.ExtractResourceValueByContainerNameAndNodeAllocatable(
				item.ResourceFieldRef, p.pod, item.ResourceFieldRef.ContainerName, p.manager.cfg.Allocatable())
		}
		if err != nil {
			return fmt.Errorf("downward API file %q: %w", item.Path, err)
		}
		e.data = []byte(text)
		if err := p.add(item.Path, e); err != nil {
			return err
		}
	}
	return nil
}

func (p *payload) projected(ctx context.Context, src *corev1.ProjectedVolumeSource) error {
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
			err = p.token(ctx, s.ServiceAccountToken, m)
		default:
			err = fmt.Errorf("projected source %d (clusterTrustBundle or podCertificate) is %w", i, ErrUnsupported)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// held says what the token file of a volume holds, so that an agent that
// starts anew knows when to renew it.
type held struct {
	Audience string    `json:"audience"`
	Seconds  int64     `json:"seconds"`
	Issued   time.Time `json:"issued"`
	Expires  time.Time `json:"expires"`
}

// renewAt is when upstream's kubelet renews: at 80 % of the lifetime, or after
// a day.
func (h held) renewAt() time.Time {
	at := h.Issued.Add(h.Expires.Sub(h.Issued) * 8 / 10)
	if day := h.Issued.Add(24 * time.Hour); day.Before(at) {
		return day
	}
	return at
}

// token adds a service account token: the one already in the volume while it
// is good, or a new one. When a new one cannot be had, one that has not expired
// stays and is tried again soon.
func (p *payload) token(ctx context.Context, src *corev1.ServiceAccountTokenProjection, mode int32) error {
	now := p.manager.cfg.Now()
	want := held{Audience: src.Audience, Seconds: 3607}
	if src.ExpirationSeconds != nil {
		want.Seconds = *src.ExpirationSeconds
	}
	e := entry{mode: 0o600, uid: -1}
	switch uid, one := singleUser(p.pod); {
	case fsGroup(p.pod) != nil:
		e.mode = 0o600 | 0o040
	case one:
		e.uid = int(uid)
	default:
		e.mode = mode
	}
	record := filepath.Join(filepath.Dir(p.current), "."+filepath.Base(p.current)+"-"+strings.ReplaceAll(src.Path, "/", "~")+".json")
	old, oldToken := readHeld(record, filepath.Join(p.current, src.Path))
	usable := oldToken != nil && old.Audience == want.Audience && old.Seconds == want.Seconds && now.Before(old.Expires)
	if usable && now.Before(old.renewAt()) {
		e.data = oldToken
		p.renew(old.renewAt())
		return p.add(src.Path, e)
	}
	tr := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: &want.Seconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: p.pod.Name, UID: p.pod.UID},
	}}
	if src.Audience != "" {
		tr.Spec.Audiences = []string{src.Audience}
	}
	got, err := p.manager.cfg.Tokens(ctx, p.pod.Namespace, p.pod.Spec.ServiceAccountName, tr)
	if err != nil {
		if usable {
			p.manager.cfg.Logger.Warn("cannot renew a service account token; the old one stays", "pod", p.pod.Namespace+"/"+p.pod.Name, "expires", old.Expires, "error", err)
			e.data = oldToken
			p.renew(now.Add(10 * time.Second))
			return p.add(src.Path, e)
		}
		return fmt.Errorf("token for service account %q: %w", p.pod.Spec.ServiceAccountName, err)
	}
	want.Issued, want.Expires = now, got.Status.ExpirationTimestamp.Time
	e.data = []byte(got.Status.Token)
	if raw, err := json.Marshal(want); err == nil {
		if err := os.MkdirAll(filepath.Dir(record), 0o750); err != nil {
			return err
		}
		if err := os.WriteFile(record, raw, 0o600); err != nil {
			return err
		}
	}
	p.renew(want.renewAt())
	return p.add(src.Path, e)
}

func (p *payload) renew(at time.Time) {
	if p.refresh.IsZero() || at.Before(p.refresh) {
		p.refresh = at
	}
}

func readHeld(record, token string) (held, []byte) {
	var h held
	raw, err := os.ReadFile(record)
	if err != nil || json.Unmarshal(raw, &h) != nil {
		return held{}, nil
	}
	data, err := os.ReadFile(token)
	if err != nil {
		return held{}, nil
	}
	return h, data
}

// singleUser returns the user that all containers of a pod run as, when the
// spec says so.
func singleUser(pod *corev1.Pod) (int64, bool) {
	var uid *int64
	if sc := pod.Spec.SecurityContext; sc != nil {
		uid = sc.RunAsUser
	}
	var found *int64
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			u := uid
			if sc := list[i].SecurityContext; sc != nil && sc.RunAsUser != nil {
				u = sc.RunAsUser
			}
			if u == nil || found != nil && *found != *u {
				return 0, false
			}
			found = u
		}
	}
	if found == nil {
		return 0, false
	}
	return *found, true
}
