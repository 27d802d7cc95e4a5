package csi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	utilversion "k8s.io/apimachinery/pkg/util/version"
	kubeletapis "k8s.io/kubelet/pkg/apis"

	"timonel/agent/plugin"
)

const (
	// callTimeout bounds a deed, the kubelet's csiTimeout.
	callTimeout = 2 * time.Minute
	// maxAnswer bounds what a driver answers, in bytes.
	maxAnswer = 1 << 20
	// maxNodeID, maxSegments and maxText bound what it says of this node: they become
	// part of the Node and the CSINode.
	maxNodeID   = 256
	maxSegments = 32
	maxText     = 1 << 10
	maxDrivers  = 100
)

// NodeIDs is the annotation of a Node with what drivers call it.
const NodeIDs = "csi.volume.kubernetes.io/nodeid"

// driver is one that is registered, or is being.
type driver struct {
	name    string
	socket  string // its registration socket
	version *utilversion.Version
	conn    *grpc.ClientConn
	ready   bool
	can     abilities
	node    storagev1.CSINodeDriver
	labels  map[string]string
}

// abilities are what a driver's node service says that it can do.
type abilities struct {
	stage, stats, expand, multiWriter, group bool
}

func (d *driver) client() csi.NodeClient { return csi.NewNodeClient(d.conn) }

func (d *driver) close() {
	if d.conn != nil {
		_ = d.conn.Close()
	}
}

// Register takes a driver, once it has said what this node is to it. It implements
// [plugin.Handler]. As upstream's, a name that a driver has is not given to another that
// says to be no newer, for as long as the first one's socket is there.
func (m *Manager) Register(ctx context.Context, p plugin.Plugin) error {
	version, err := highest(p)
	if err != nil {
		return err
	}
	if err := checkKey(key{p.Name, "-"}); err != nil {
		return err
	}
	dir, name, err := m.endpoint(p)
	if err != nil {
		return err
	}
	d := &driver{name: p.Name, socket: p.Socket, version: version}
	if d.conn, err = plugin.Dial(dir, name, maxAnswer); err != nil {
		return err
	}
	if err := m.reserve(d); err != nil {
		d.close()
		return err
	}
	err = d.ask(ctx)
	if err == nil {
		err = m.checkLabels(d)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.drivers[d.name] != d:
		d.close()
		return errors.Join(err, fmt.Errorf("driver %s was replaced while it registered", d.name))
	case err != nil:
		delete(m.drivers, d.name)
		d.close()
		return err
	}
	d.ready = true
	delete(m.gone, d.name)
	m.tellDrivers()
	for _, v := range m.volumes {
		if v.Driver == d.name {
			clear(v.put) // what failed was another's
			m.kick(v)
		}
	}
	return nil
}

// reserve gives a driver its name.
func (m *Manager) reserve(d *driver) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.drivers[d.name]
	if old != nil && !old.version.LessThan(d.version) {
		return fmt.Errorf("for CSI driver %q failed. Another driver with the same name is already registered with a higher supported version: %q", d.name, old.version)
	}
	if old == nil && len(m.drivers) >= maxDrivers {
		return fmt.Errorf("this node has %d CSI drivers, and takes no more", len(m.drivers))
	}
	if old != nil {
		old.close()
	}
	m.drivers[d.name] = d
	return nil
}

// Deregister drops a driver. What it has mounted stays, and is taken back when it is here
// again.
func (m *Manager) Deregister(p plugin.Plugin) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.drivers[p.Name]
	if d == nil || d.socket != p.Socket {
		return // another has the name
	}
	d.close()
	delete(m.drivers, p.Name)
	if len(m.gone) >= maxDrivers { // an entry that stays is put right by who registers next
		clear(m.gone)
	}
	m.gone[p.Name] = true
	m.tellDrivers()
}

// highest is the highest version that this agent can speak, as upstream has it: of 1.x.
func highest(p plugin.Plugin) (*utilversion.Version, error) {
	if len(p.Versions) == 0 {
		return nil, fmt.Errorf("for CSI driver %q failed. Plugin returned an empty list for supported versions", p.Name)
	}
	v, err := utilversion.HighestSupportedVersion(p.Versions)
	if err != nil {
		return nil, fmt.Errorf("for CSI driver %q failed. None of the versions specified %q are supported. err=%w", p.Name, p.Versions, err)
	}
	return v, nil
}

// endpoint finds a driver's socket by the path that it says, which is as drivers see it.
// It has to be in the agent's folder for plugins: no other socket of the machine is
// connected to for a driver's word.
func (m *Manager) endpoint(p plugin.Plugin) (dir, name string, err error) {
	if p.Endpoint == "" {
		return filepath.Join(m.cfg.Root, "plugins_registry"), p.Socket, nil
	}
	at := filepath.Clean(strings.TrimPrefix(p.Endpoint, "unix://"))
	for _, root := range []string{m.cfg.Seen, m.cfg.Root} {
		for _, folder := range []string{"plugins", "plugins_registry"} {
			if rel, err := filepath.Rel(filepath.Join(root, folder), at); err == nil && filepath.IsLocal(rel) && rel != "." {
				return filepath.Join(m.cfg.Root, folder), rel, nil
			}
		}
	}
	return "", "", fmt.Errorf("the socket %q of CSI driver %s is not in %s: give --kubelet-registration-path there to its registrar",
		p.Endpoint, p.Name, filepath.Join(m.cfg.Seen, "plugins"))
}

// ask asks a driver what it can do and what this node is to it.
func (d *driver) ask(ctx context.Context) error {
	caps, err := d.client().NodeGetCapabilities(ctx, &csi.NodeGetCapabilitiesRequest{})
	if err != nil {
		return fmt.Errorf("ask CSI driver %s what it can do: %w", d.name, err)
	}
	for _, c := range caps.Capabilities {
		switch c.GetRpc().GetType() {
		case csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME:
			d.can.stage = true
		case csi.NodeServiceCapability_RPC_GET_VOLUME_STATS:
			d.can.stats = true
		case csi.NodeServiceCapability_RPC_EXPAND_VOLUME:
			d.can.expand = true
		case csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER:
			d.can.multiWriter = true
		case csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP:
			d.can.group = true
		}
	}
	info, err := d.client().NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
	if err != nil {
		return fmt.Errorf("ask CSI driver %s for this node: %w", d.name, err)
	}
	segments := info.GetAccessibleTopology().GetSegments()
	switch {
	case info.NodeId == "":
		return errors.New("error adding CSI driver node info: driverNodeID must not be empty")
	case len(info.NodeId) > maxNodeID:
		return fmt.Errorf("CSI driver %s calls this node by %d bytes: no more than %d can be", d.name, len(info.NodeId), maxNodeID)
	case len(segments) > maxSegments:
		return fmt.Errorf("CSI driver %s says %d segments of topology: no more than %d can be", d.name, len(segments), maxSegments)
	}
	for k, v := range segments {
		if bad := append(validation.IsQualifiedName(k), validation.IsValidLabelValue(v)...); len(bad) > 0 {
			return fmt.Errorf("CSI driver %s: topology %.100q=%.100q is no label: %s", d.name, k, v, strings.Join(bad, "; "))
		}
	}
	d.labels = maps.Clone(segments)
	d.node = storagev1.CSINodeDriver{Name: d.name, NodeID: info.NodeId, TopologyKeys: slices.Sorted(maps.Keys(segments))}
	if n := info.MaxVolumesPerNode; n > 0 {
		d.node.Allocatable = &storagev1.VolumeNodeResources{Count: new(int32(min(n, 1<<31-1)))}
	}
	return nil
}

// checkLabels refuses a driver whose topology this node cannot say: a label that it has
// with another value, or one that a node may not give itself.
func (m *Manager) checkLabels(d *driver) error {
	live := m.cfg.Live()
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, v := range d.labels {
		if prefix, _, _ := strings.Cut(k, "/"); strings.HasSuffix(prefix, "kubernetes.io") || strings.HasSuffix(prefix, "k8s.io") {
			if !kubeletapis.IsKubeletLabel(k) {
				return fmt.Errorf("CSI driver %s: a node may not give itself the label %s", d.name, k)
			}
		}
		if live != nil {
			if has, ok := live.Labels[k]; ok && has != v {
				return fmt.Errorf("detected topology value collision: driver reported %q:%q but existing label is %q:%q", k, v, k, has)
			}
		}
		for _, other := range m.drivers {
			if has, ok := other.labels[k]; ok && other != d && has != v {
				return fmt.Errorf("detected topology value collision: driver reported %q:%q but existing label is %q:%q", k, v, k, has)
			}
		}
	}
	return nil
}

// tellDrivers says which drivers there are. m.mu is held.
func (m *Manager) tellDrivers() {
	node := &storagev1.CSINode{}
	node.Name = m.cfg.Node
	for _, name := range slices.Sorted(maps.Keys(m.drivers)) {
		if d := m.drivers[name]; d.ready {
			node.Spec.Drivers = append(node.Spec.Drivers, d.node)
		}
	}
	if m.cfg.Drivers != nil {
		m.cfg.Drivers(node, slices.Sorted(maps.Keys(m.gone)))
	}
	if m.cfg.NodeChanged != nil {
		m.cfg.NodeChanged()
	}
}

// Facts are what the Node says of CSI.
type Facts struct {
	// Labels are the topology that drivers say.
	Labels map[string]string
	// NodeIDs is the annotation [NodeIDs]; empty: there is no driver.
	NodeIDs string
	// InUse are the volumes that are not to be detached.
	InUse []corev1.UniqueVolumeName
}

// Facts returns what the Node is to say now.
func (m *Manager) Facts() Facts {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := Facts{Labels: map[string]string{}, InUse: slices.Clone(m.inUse)}
	ids := map[string]string{}
	for name, d := range m.drivers {
		if d.ready {
			ids[name] = d.node.NodeID
			maps.Copy(f.Labels, d.labels)
		}
	}
	if len(ids) > 0 {
		raw, _ := json.Marshal(ids) // strings alone
		f.NodeIDs = string(raw)
	}
	return f
}
