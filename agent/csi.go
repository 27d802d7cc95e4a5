package agent

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"timonel/agent/csi"
	"timonel/agent/hostile"
	"timonel/agent/plugin"
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
