// Package csidriver is a small CSI driver for tests: its volumes are folders of this
// machine, which it really mounts, or block devices that are nodes alone. It can be told to
// fail, to hang and to lie, and counts what it was asked for.
//
//	d, err := csidriver.Start(csidriver.Config{Name: "d.example", Dir: folder, Socket: path})
//	defer d.Stop()
package csidriver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Config says what a driver is like.
type Config struct {
	Name string
	// Dir has the volumes: a folder each.
	Dir string
	// Socket is where it serves.
	Socket string
	// NodeID is what it calls its node. Default "node".
	NodeID string
	// Segments are its topology.
	Segments map[string]string
	// MaxVolumes is how many a node can have; 0: it does not say.
	MaxVolumes int64
	// Can are what its node service can do. Default: all that it knows.
	Can []csi.NodeServiceCapability_RPC_Type
	// Before is asked before each call; an error is the call's answer.
	Before func(ctx context.Context, method string, req any) error
	// After is asked after a call that was done; an error is its answer.
	After func(method string, req any) error
}

// all that the node service can do.
var all = []csi.NodeServiceCapability_RPC_Type{
	csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME, csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	csi.NodeServiceCapability_RPC_EXPAND_VOLUME, csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
}

// Driver is one that serves.
type Driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer
	cfg    Config
	server *grpc.Server
	done   chan struct{}

	mu    sync.Mutex
	calls []string
	sizes map[string]int64 // by volume id
	one   sync.Mutex       // one call changes mounts at a time
}

// Start serves until Stop.
func Start(cfg Config) (*Driver, error) {
	if cfg.NodeID == "" {
		cfg.NodeID = "node"
	}
	if cfg.Can == nil {
		cfg.Can = all
	}
	if err := errors.Join(os.MkdirAll(cfg.Dir, 0o755), os.MkdirAll(filepath.Dir(cfg.Socket), 0o755)); err != nil {
		return nil, err
	}
	_ = os.Remove(cfg.Socket) // of one before, that was killed
	l, err := net.Listen("unix", cfg.Socket)
	if err != nil {
		return nil, err
	}
	d := &Driver{cfg: cfg, done: make(chan struct{}), sizes: map[string]int64{}}
	d.server = grpc.NewServer(grpc.UnaryInterceptor(d.intercept))
	csi.RegisterIdentityServer(d.server, d)
	csi.RegisterControllerServer(d.server, d)
	csi.RegisterNodeServer(d.server, d)
	go func() {
		defer close(d.done)
		_ = d.server.Serve(l)
	}()
	return d, nil
}

// Stop ends it at once, as a kill does, but for its mounts.
func (d *Driver) Stop() {
	d.server.Stop()
	<-d.done
}

// Calls are the node service's calls that changed something, in order: the method and the
// volume.
func (d *Driver) Calls() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.calls)
}

func (d *Driver) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	if r, ok := req.(interface{ GetVolumeId() string }); ok && strings.HasPrefix(method, "Node") && method != "NodeGetVolumeStats" {
		d.mu.Lock()
		d.calls = append(d.calls, method+" "+r.GetVolumeId())
		d.mu.Unlock()
	}
	if d.cfg.Before != nil {
		if err := d.cfg.Before(ctx, method, req); err != nil {
			return nil, err
		}
	}
	resp, err := handle(ctx, req)
	if err == nil && d.cfg.After != nil {
		if err := d.cfg.After(method, req); err != nil {
			return nil, err
		}
	}
	return resp, err
}

// GetPluginInfo implements csi.IdentityServer.
func (d *Driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: d.cfg.Name, VendorVersion: "1"}, nil
}

// GetPluginCapabilities implements csi.IdentityServer.
func (d *Driver) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{{Type: &csi.PluginCapability_Service_{
		Service: &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}}}}}, nil
}

// Probe implements csi.IdentityServer.
func (d *Driver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

// NodeGetCapabilities implements csi.NodeServer.
func (d *Driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	out := &csi.NodeGetCapabilitiesResponse{}
	for _, can := range d.cfg.Can {
		out.Capabilities = append(out.Capabilities, &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: can}}})
	}
	return out, nil
}

// NodeGetInfo implements csi.NodeServer.
func (d *Driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	out := &csi.NodeGetInfoResponse{NodeId: d.cfg.NodeID, MaxVolumesPerNode: d.cfg.MaxVolumes}
	if d.cfg.Segments != nil {
		out.AccessibleTopology = &csi.Topology{Segments: d.cfg.Segments}
	}
	return out, nil
}

// folder is where a volume is.
func (d *Driver) folder(id string) (string, error) {
	if id == "" {
		return "", status.Error(codes.InvalidArgument, "volume id is missing")
	}
	if !filepath.IsLocal(id) || strings.ContainsRune(id, '/') {
		return "", status.Errorf(codes.NotFound, "no volume %q", id)
	}
	return filepath.Join(d.cfg.Dir, id), nil
}

// MountCount is how many mounts there are at a path.
func MountCount(path string) (n int, err error) {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == path {
			n++
		}
	}
	return n, nil
}

// bind mounts a folder on another, once.
func (d *Driver) bind(from, to string, readOnly bool) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	if n, err := MountCount(to); n > 0 || err != nil {
		return err
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	if readOnly {
		if err := unix.Mount("", to, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			return status.Error(codes.Internal, err.Error())
		}
	}
	return nil
}

func (d *Driver) unbind(path string, remove bool) error {
	n, err := MountCount(path)
	if err != nil {
		return err
	}
	for range n {
		if err := unix.Unmount(path, 0); err != nil {
			return status.Error(codes.Internal, err.Error())
		}
	}
	if remove {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return status.Error(codes.Internal, err.Error())
		}
	}
	return nil
}

// NodeStageVolume implements csi.NodeServer.
func (d *Driver) NodeStageVolume(_ context.Context, r *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	from, err := d.folder(r.VolumeId)
	switch {
	case err != nil:
		return nil, err
	case r.StagingTargetPath == "" || r.VolumeCapability == nil:
		return nil, status.Error(codes.InvalidArgument, "staging path or capability is missing")
	}
	d.one.Lock()
	defer d.one.Unlock()
	if _, err := os.Stat(from); err != nil {
		return nil, status.Errorf(codes.NotFound, "no volume %s", r.VolumeId)
	}
	if r.VolumeCapability.GetBlock() == nil {
		if err := d.bind(from, r.StagingTargetPath, false); err != nil {
			return nil, err
		}
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

// NodeUnstageVolume implements csi.NodeServer.
func (d *Driver) NodeUnstageVolume(_ context.Context, r *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if r.VolumeId == "" || r.StagingTargetPath == "" {
		return nil, status.Error(codes.InvalidArgument, "volume id or staging path is missing")
	}
	d.one.Lock()
	defer d.one.Unlock()
	if err := d.unbind(r.StagingTargetPath, false); err != nil {
		return nil, err
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// blockDevice is what block volumes are: no kernel has that many loop devices.
var blockDevice = int(unix.Mkdev(7, 4000))

// NodePublishVolume implements csi.NodeServer. A volume of a pod's own is made.
func (d *Driver) NodePublishVolume(_ context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	from, err := d.folder(r.VolumeId)
	switch {
	case err != nil:
		return nil, err
	case r.TargetPath == "" || r.VolumeCapability == nil:
		return nil, status.Error(codes.InvalidArgument, "target path or capability is missing")
	}
	d.one.Lock()
	defer d.one.Unlock()
	if r.VolumeContext["csi.storage.k8s.io/ephemeral"] == "true" {
		if err := os.MkdirAll(from, 0o755); err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
	}
	if _, err := os.Stat(from); err != nil {
		return nil, status.Errorf(codes.NotFound, "no volume %s", r.VolumeId)
	}
	if r.VolumeCapability.GetBlock() != nil {
		if err := unix.Mknod(r.TargetPath, unix.S_IFBLK|0o600, blockDevice); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, status.Error(codes.Internal, err.Error())
		}
		return &csi.NodePublishVolumeResponse{}, nil
	}
	if err := d.bind(from, r.TargetPath, r.Readonly); err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// NodeUnpublishVolume implements csi.NodeServer.
func (d *Driver) NodeUnpublishVolume(_ context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if r.VolumeId == "" || r.TargetPath == "" {
		return nil, status.Error(codes.InvalidArgument, "volume id or target path is missing")
	}
	d.one.Lock()
	defer d.one.Unlock()
	if err := d.unbind(r.TargetPath, true); err != nil {
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// NodeExpandVolume implements csi.NodeServer.
func (d *Driver) NodeExpandVolume(_ context.Context, r *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	if r.VolumeId == "" || r.VolumePath == "" {
		return nil, status.Error(codes.InvalidArgument, "volume id or path is missing")
	}
	if err := d.there(r.VolumeId, r.VolumePath); err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.sizes[r.VolumeId] = r.GetCapacityRange().GetRequiredBytes()
	d.mu.Unlock()
	return &csi.NodeExpandVolumeResponse{CapacityBytes: r.GetCapacityRange().GetRequiredBytes()}, nil
}

// Size is what the node's part of a volume was last made to have, in bytes.
func (d *Driver) Size(id string) int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sizes[id]
}

func (d *Driver) there(id, path string) error {
	folder, err := d.folder(id)
	if err != nil {
		return err
	}
	for _, p := range []string{folder, path} {
		if _, err := os.Stat(p); err != nil {
			return status.Errorf(codes.NotFound, "volume %s: %v", id, err)
		}
	}
	return nil
}

// NodeGetVolumeStats implements csi.NodeServer.
func (d *Driver) NodeGetVolumeStats(_ context.Context, r *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if r.VolumeId == "" || r.VolumePath == "" {
		return nil, status.Error(codes.InvalidArgument, "volume id or path is missing")
	}
	if err := d.there(r.VolumeId, r.VolumePath); err != nil {
		return nil, err
	}
	var s unix.Statfs_t
	if err := unix.Statfs(r.VolumePath, &s); err != nil {
		return nil, status.Error(codes.Internal, fmt.Sprint(err))
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: int64(s.Blocks) * s.Bsize, Available: int64(s.Bavail) * s.Bsize, Used: int64(s.Blocks-s.Bfree) * s.Bsize},
		{Unit: csi.VolumeUsage_INODES, Total: int64(s.Files), Available: int64(s.Ffree), Used: int64(s.Files - s.Ffree)},
	}}, nil
}
