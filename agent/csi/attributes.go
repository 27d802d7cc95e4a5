package csi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"

	"timonel/agent/hostile"
)

// republishEvery is how often a driver that asks for it (CSIDriver's requiresRepublish) is
// asked to publish a volume again: about as often as a kubelet looks at a pod.
const republishEvery = time.Minute

// digest is the hex of the SHA-256 of strings put together.
func digest(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "")))
	return hex.EncodeToString(sum[:])
}

func fsGroup(pod *corev1.Pod) *int64 {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	return pod.Spec.SecurityContext.FSGroup
}

func (r *Request) fsType() string {
	switch {
	case r.PV != nil:
		return r.PV.Spec.CSI.FSType
	case r.Source.FSType != nil:
		return *r.Source.FSType
	}
	return ""
}

// republish is how often a volume is to be published again; 0: it is not.
func (m *Manager) republish(r *Request) time.Duration {
	if d, ok := m.cfg.CSIDriver(r.key().Driver); ok && d.Spec.RequiresRepublish != nil && *d.Spec.RequiresRepublish {
		return republishEvery
	}
	return 0
}

// checkLifecycle says why a driver does not serve volumes of a kind, as upstream's
// supportsVolumeLifecycleMode.
func (m *Manager) checkLifecycle(driver string, inline bool) error {
	mode := storagev1.VolumeLifecyclePersistent
	if inline {
		mode = storagev1.VolumeLifecycleEphemeral
	}
	d, ok := m.cfg.CSIDriver(driver)
	switch {
	case !ok && !inline:
		return nil
	case !ok:
		return fmt.Errorf("kubernetes.io/csi: mounter.SetupAt failed to check volume lifecycle mode: volume mode %q not supported by driver %s (no CSIDriver object)", mode, driver)
	case !slices.Contains(d.Spec.VolumeLifecycleModes, mode) && !(len(d.Spec.VolumeLifecycleModes) == 0 && !inline):
		return fmt.Errorf("kubernetes.io/csi: mounter.SetupAt failed to check volume lifecycle mode: volume mode %q not supported by driver %s (only supports %q)", mode, driver, d.Spec.VolumeLifecycleModes)
	}
	return nil
}

// secrets are what is in a Secret that a volume names; none if it names none.
func (m *Manager) secrets(field string, ref *corev1.SecretReference) (map[string]string, error) {
	if ref == nil {
		return nil, nil
	}
	s, ok := m.cfg.Secret(ref.Namespace, ref.Name)
	if !ok {
		return nil, fmt.Errorf("fetching %s %s/%s failed: it is not known here", field, ref.Namespace, ref.Name)
	}
	out := make(map[string]string, len(s.Data))
	for k, v := range s.Data {
		out[k] = string(v)
	}
	return out, nil
}

// attributes are what a driver is told of a volume and its pod, and its Secrets.
func (m *Manager) attributes(ctx context.Context, driver string, r *Request) (attributes, secrets map[string]string, err error) {
	attributes = map[string]string{}
	if r.Inline {
		maps.Copy(attributes, r.Source.VolumeAttributes)
		if ref := r.Source.NodePublishSecretRef; ref != nil {
			secrets, err = m.secrets("NodePublishSecretRef", &corev1.SecretReference{Namespace: r.Pod.Namespace, Name: ref.Name})
		}
	} else {
		maps.Copy(attributes, r.PV.Spec.CSI.VolumeAttributes)
		secrets, err = m.secrets("NodePublishSecretRef", r.PV.Spec.CSI.NodePublishSecretRef)
	}
	if err != nil {
		return nil, nil, err
	}
	d, ok := m.cfg.CSIDriver(driver)
	if !ok {
		return attributes, secrets, nil
	}
	if d.Spec.PodInfoOnMount != nil && *d.Spec.PodInfoOnMount {
		maps.Copy(attributes, map[string]string{
			"csi.storage.k8s.io/pod.name":            r.Pod.Name,
			"csi.storage.k8s.io/pod.namespace":       r.Pod.Namespace,
			"csi.storage.k8s.io/pod.uid":             string(r.Pod.UID),
			"csi.storage.k8s.io/serviceAccount.name": r.Pod.Spec.ServiceAccountName,
			"csi.storage.k8s.io/ephemeral":           strconv.FormatBool(r.Inline),
		})
	}
	if r.Block || len(d.Spec.TokenRequests) == 0 {
		return attributes, secrets, nil
	}
	tokens, err := m.tokens(ctx, d, r.Pod)
	if err != nil {
		return nil, nil, err
	}
	const name = "csi.storage.k8s.io/serviceAccount.tokens"
	if d.Spec.ServiceAccountTokenInSecrets != nil && *d.Spec.ServiceAccountTokenInSecrets {
		if secrets == nil {
			secrets = map[string]string{}
		}
		secrets[name] = tokens
	} else {
		attributes[name] = tokens
	}
	return attributes, secrets, nil
}

// tokens are those of a pod's service account that a driver asks for, by audience, as
// JSON.
func (m *Manager) tokens(ctx context.Context, d *storagev1.CSIDriver, pod *corev1.Pod) (string, error) {
	if m.cfg.Tokens == nil {
		return "", errors.New("no tokens of service accounts can be had here")
	}
	out := map[string]authenticationv1.TokenRequestStatus{}
	for _, want := range d.Spec.TokenRequests {
		tr := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
			ExpirationSeconds: want.ExpirationSeconds,
			BoundObjectRef:    &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
		}}
		if want.Audience != "" {
			tr.Spec.Audiences = []string{want.Audience}
		}
		got, err := m.cfg.Tokens(ctx, pod.Namespace, pod.Spec.ServiceAccountName, tr)
		if err != nil {
			return "", fmt.Errorf("token of service account %s for driver %s: %w", pod.Spec.ServiceAccountName, d.Name, err)
		}
		out[want.Audience] = got.Status
	}
	raw, err := json.Marshal(out)
	return string(raw), err
}

// givesGroup says whether the agent gives a volume to the pod's fsGroup, as upstream's
// supportsFSGroup.
func (m *Manager) givesGroup(driver string, r *Request) bool {
	if r.Block || fsGroup(r.Pod) == nil || r.ReadOnly {
		return false
	}
	policy := storagev1.ReadWriteOnceWithFSTypeFSGroupPolicy
	if d, ok := m.cfg.CSIDriver(driver); ok && d.Spec.FSGroupPolicy != nil && *d.Spec.FSGroupPolicy != "" {
		policy = *d.Spec.FSGroupPolicy
	}
	switch {
	case policy == storagev1.NoneFSGroupPolicy:
		return false
	case policy == storagev1.FileFSGroupPolicy:
		return true
	case r.fsType() == "":
		return false
	}
	return r.Inline || slices.Contains(r.PV.Spec.AccessModes, corev1.ReadWriteOnce) || slices.Contains(r.PV.Spec.AccessModes, corev1.ReadWriteOncePod)
}

// giveToGroup gives what is mounted to the pod's fsGroup, unless the driver does.
func (m *Manager) giveToGroup(ctx context.Context, j *job, rec *published) error {
	r := j.want
	if j.driver.can.group || !m.givesGroup(j.key.Driver, r) {
		return nil
	}
	root, err := hostile.OpenRoot(m.cfg.Root)
	if err != nil {
		return err
	}
	defer root.Close()
	at, err := root.OpenMount(filepath.Clean(rec.Path))
	if err != nil {
		return err
	}
	defer at.Close()
	gid := int(*fsGroup(r.Pod))
	if p := r.Pod.Spec.SecurityContext.FSGroupChangePolicy; p != nil && *p == corev1.FSGroupChangeOnRootMismatch {
		if has, err := at.HasGroup(".", gid, false); has || err != nil {
			return err
		}
	}
	return at.SetGroup(ctx, ".", gid, false)
}

// size is how many bytes a volume has.
func size(r *Request) int64 {
	if r.PV == nil {
		return 0
	}
	q := r.PV.Spec.Capacity[corev1.ResourceStorage]
	return q.Value()
}

// has is how many bytes the claim says that its volume has for pods; 0: it does not say.
func (r *Request) has() int64 {
	if r.Claim == nil {
		return 0
	}
	q := r.Claim.Status.Capacity[corev1.ResourceStorage]
	return q.Value()
}

// nodeExpansionNotRequired is the annotation of a claim whose volume has nothing that nodes
// grow.
const nodeExpansionNotRequired = "volume.kubernetes.io/node-expansion-not-required"

// growth is to how many bytes the node's part of a volume has to be made larger; 0: it has
// not to be, or not yet. As upstream's NodeExpander.runPreCheck
// (pkg/volume/util/operationexecutor): a resizer that allocates sizes in the claim's status
// says there when it is the node's turn, and when no node is to try. A claim that says the
// volume's size needs nothing of the node, but of each node where many write.
func growth(r *Request, rec *published) int64 {
	to := size(r)
	if rec.Size <= 0 || to <= rec.Size || r.has() <= 0 || r.ReadOnly {
		return 0
	}
	st := &r.Claim.Status
	status := st.AllocatedResourceStatuses[corev1.ResourceStorage]
	if allocates := status != "" || st.AllocatedResources != nil; allocates {
		q := st.AllocatedResources[corev1.ResourceStorage]
		if to = q.Value(); to <= rec.Size {
			return 0
		}
	}
	switch {
	case status == corev1.PersistentVolumeClaimNodeResizePending, status == corev1.PersistentVolumeClaimNodeResizeInProgress:
		return to
	case status != "":
		return 0
	case r.has() >= to:
		_, others := r.Claim.Annotations[nodeExpansionNotRequired]
		if others || !slices.Contains(r.Claim.Spec.AccessModes, corev1.ReadWriteMany) {
			return 0
		}
		return to
	case st.AllocatedResources != nil: // it has not said whose turn it is
		return 0
	}
	return to
}
