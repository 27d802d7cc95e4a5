package agent

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"timonel/agent/csi"
	"timonel/agent/hostile"
	"timonel/agent/plugin"
	"timonel/agent/volume"
)

// newCSI makes what CSI drivers of this node are called by, and where they register.
func (a *Agent) newCSI() {
	a.csi = csi.New(csi.Config{
		Node: a.cfg.Name, Root: a.cfg.DataDir, Seen: a.cfg.KubeletDir, Dir: a.cfg.dir("csi"), Objects: a.store,
		Live: func() *corev1.Node {
			a.mu.Lock()
			defer a.mu.Unlock()
			return a.live
		},
		Tokens: a.stream.Token, Grown: a.stream.ClaimGrown, Drivers: a.stream.SetCSINode, NodeChanged: a.kick,
		Changed: func(uid types.UID) { a.pods.VolumeChanged(uid) }, Logger: a.log,
	})
	a.plugins = plugin.New(plugin.Config{
		Dir: a.cfg.dir("plugins_registry"), Handlers: map[string]plugin.Handler{registration.CSIPlugin: a.csi}, Logger: a.log,
	})
}

// linkKubeletDir makes the data folder be where the manifests of CSI drivers look for a
// kubelet's: they mount its plugins, plugins_registry and pods.
func (c *Config) linkKubeletDir() error {
	plugins, err := hostile.MakeRoot(c.dir("plugins"), 0o750)
	if err != nil {
		return err
	}
	plugins.Close()
	if c.KubeletDir == c.DataDir {
		return nil
	}
	if err := hostile.MakeLink(c.KubeletDir, c.DataDir); err != nil {
		return fmt.Errorf("--kubelet-dir: %w: remove what is there if no kubelet runs on this machine, or give another folder", err)
	}
	return nil
}

// volumeStats are the figures of a pod's volumes of CSI drivers, as the drivers say them.
func (a *Agent) volumeStats(pod *corev1.Pod) []stats.VolumeStats {
	var out []stats.VolumeStats
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		u, known := a.csi.Stats(pod.UID, v.Name)
		if !known {
			continue
		}
		said := func(n int64) *uint64 {
			if n < 0 {
				return nil
			}
			return new(uint64(n))
		}
		vs := stats.VolumeStats{Name: v.Name, FsStats: stats.FsStats{
			Time: metav1.NewTime(u.Time), CapacityBytes: said(u.Capacity), AvailableBytes: said(u.Available), UsedBytes: said(u.Used),
			Inodes: said(u.Inodes), InodesFree: said(u.InodesAvailable), InodesUsed: said(u.InodesUsed),
		}}
		if claim := volume.ClaimOf(pod, v); claim != "" {
			vs.PVCRef = &stats.PVCReference{Namespace: pod.Namespace, Name: claim}
		}
		out = append(out, vs)
	}
	return out
}
