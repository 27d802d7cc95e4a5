package volume

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"

	"timonel/agent/hostile"
)

// maxRecord bounds the record of a token, or of a key and its certificates.
const maxRecord = 1 << 20

// held is a token that was issued, and what for. It is kept in the pod's folder
// beside the volumes, where no container sees it, for the agent's next start:
// what is in the volume itself is never believed.
type held struct {
	Audience string    `json:"audience"`
	Seconds  int64     `json:"seconds"`
	Issued   time.Time `json:"issued"`
	Expires  time.Time `json:"expires"`
	Token    string    `json:"token"`
}

// renewAt is when upstream's kubelet renews: at 80 % of the lifetime, or after
// a day.
func (h *held) renewAt() time.Time {
	at := h.Issued.Add(h.Expires.Sub(h.Issued) * 8 / 10)
	if day := h.Issued.Add(24 * time.Hour); day.Before(at) {
		return day
	}
	return at
}

// token adds a service account token: the one that was issued last while it is
// good, or a new one. When a new one cannot be had, one that has not expired
// stays and is tried again soon.
func (p *payload) token(src *corev1.ServiceAccountTokenProjection, mode int32) error {
	now := p.manager.cfg.Now()
	want := held{Audience: src.Audience, Seconds: 3607}
	if src.ExpirationSeconds != nil {
		want.Seconds = *src.ExpirationSeconds
	}
	e := p.private(mode)
	records, err := p.manager.podSubDir(p.pod.UID, "tokens")
	if err != nil {
		return err
	}
	defer records.Close()
	record := recordName(p.volume, src.Path)
	var old held
	readRecord(records, record, &old)
	usable := old.Token != "" && old.Audience == want.Audience && old.Seconds == want.Seconds && now.Before(old.Expires)
	if usable && now.Before(old.renewAt()) {
		e.data = []byte(old.Token)
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
	got, err := p.manager.cfg.Tokens(p.ctx, p.pod.Namespace, p.pod.Spec.ServiceAccountName, tr)
	if err != nil {
		if usable {
			p.manager.cfg.Logger.Warn("cannot renew a service account token; the old one stays", "pod", p.pod.Namespace+"/"+p.pod.Name, "expires", old.Expires, "error", err)
			e.data = []byte(old.Token)
			p.renew(now.Add(10 * time.Second))
			return p.add(src.Path, e)
		}
		return fmt.Errorf("token for service account %q: %w", p.pod.Spec.ServiceAccountName, err)
	}
	want.Issued, want.Expires, want.Token = now, got.Status.ExpirationTimestamp.Time, got.Status.Token
	if err := writeRecord(records, record, &want); err != nil {
		return err
	}
	e.data = []byte(want.Token)
	p.renew(want.renewAt())
	return p.add(src.Path, e)
}

// private is a file for the pod's user alone, when its spec says which that is.
func (p *payload) private(mode int32) entry {
	e := entry{mode: mode, uid: -1}
	uid, one := singleUser(p.pod)
	if one {
		e.uid = int(uid)
	}
	if one || fsGroup(p.pod) != nil {
		e.mode = 0o600
	}
	return e
}

func (p *payload) renew(at time.Time) {
	if p.refresh.IsZero() || at.Before(p.refresh) {
		p.refresh = at
	}
}

// recordName is a file name for what is at a path of a volume, however long that is.
func recordName(volume, path string) string {
	sum := sha256.Sum256([]byte(volume + "/" + path))
	return hex.EncodeToString(sum[:16]) + ".json"
}

// readRecord reads what was kept, or leaves what is zero as it is.
func readRecord[T any](dir *hostile.Root, name string, into *T) {
	var kept T
	if raw, err := dir.ReadFile(name, maxRecord); err == nil && json.Unmarshal(raw, &kept) == nil {
		*into = kept
	}
}

// writeRecord keeps a token or a key; a crash leaves the old record or the new one.
func writeRecord(dir *hostile.Root, name string, record any) error {
	raw, err := json.Marshal(record)
	if err != nil {
		return err
	}
	next := name + ".new"
	err = dir.Remove(next)
	if err == nil {
		err = dir.Create(next, raw, 0o600, -1, -1)
	}
	if err == nil {
		err = dir.Rename(next, name)
	}
	if err != nil {
		return fmt.Errorf("keep a record of what the pod was given: %w", err)
	}
	return nil
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
