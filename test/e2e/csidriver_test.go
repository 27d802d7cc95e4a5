//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"timonel/internal/csidriver"
	"timonel/test/harness"
)

// driverEnv is the variable that has a driverProcess, as JSON, where this program is to be
// a driver.
const driverEnv = "TIMONEL_E2E_CSI_DRIVER"

// driverProcess is a driver, with its registrar: its volumes are in Dir, the agent's data
// folder is Data.
type driverProcess struct {
	Name, Dir, Data, NodeID string
	Segments                map[string]string
	MaxVolumes              int64
}

// driverCall is a call that a driver was asked, a line of JSON on its standard output.
type driverCall struct {
	Method, Volume string
	Path           string // what is to be mounted, unmounted or grown
	Bytes          int64
	Context        map[string]string // of the volume, and of its publication
	Secrets        map[string]string
}

func TestMain(m *testing.M) {
	if said := os.Getenv(driverEnv); said != "" {
		if err := beDriver(said); err != nil {
			fmt.Fprintln(os.Stderr, "driver:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// beDriver serves as a driver's container and its registrar's do, until standard input
// ends.
func beDriver(said string) error {
	var p driverProcess
	if err := json.Unmarshal([]byte(said), &p); err != nil {
		return err
	}
	var mu sync.Mutex
	out := json.NewEncoder(os.Stdout)
	endpoint := filepath.Join(p.Data, "plugins", p.Name, "csi.sock")
	d, err := csidriver.Start(csidriver.Config{
		Name: p.Name, Dir: p.Dir, Socket: endpoint, NodeID: p.NodeID, Segments: p.Segments, MaxVolumes: p.MaxVolumes,
		Before: func(_ context.Context, method string, req any) error {
			call := driverCall{Method: method}
			switch r := req.(type) {
			case *csi.NodeStageVolumeRequest:
				call.Path, call.Secrets, call.Context = r.StagingTargetPath, r.Secrets, merged(r.VolumeContext, r.PublishContext)
			case *csi.NodePublishVolumeRequest:
				call.Path, call.Secrets, call.Context = r.TargetPath, r.Secrets, merged(r.VolumeContext, r.PublishContext)
			case *csi.NodeUnpublishVolumeRequest:
				call.Path = r.TargetPath
			case *csi.NodeUnstageVolumeRequest:
				call.Path = r.StagingTargetPath
			case *csi.NodeExpandVolumeRequest:
				call.Path, call.Bytes, call.Secrets = r.VolumePath, r.GetCapacityRange().GetRequiredBytes(), r.Secrets
			default:
				return nil
			}
			call.Volume = req.(interface{ GetVolumeId() string }).GetVolumeId()
			mu.Lock()
			defer mu.Unlock()
			return out.Encode(call)
		},
	})
	if err != nil {
		return err
	}
	defer d.Stop()
	socket := filepath.Join(p.Data, "plugins_registry", p.Name+"-reg.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	defer s.Stop()
	registration.RegisterRegistrationServer(s, &registrar{info: &registration.PluginInfo{
		Type: registration.CSIPlugin, Name: p.Name, Endpoint: endpoint, SupportedVersions: []string{"1.0.0"},
	}})
	go func() { _ = s.Serve(l) }()
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func merged(of ...map[string]string) map[string]string {
	out := map[string]string{}
	for _, m := range of {
		maps.Copy(out, m)
	}
	return out
}

// registrar is the sidecar that registers a driver.
type registrar struct {
	registration.UnimplementedRegistrationServer
	info *registration.PluginInfo
}

func (r *registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return r.info, nil
}

func (r *registrar) NotifyRegistrationStatus(_ context.Context, st *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if !st.PluginRegistered {
		fmt.Fprintln(os.Stderr, "driver is not registered:", st.Error)
	}
	return &registration.RegistrationStatusResponse{}, nil
}

// runningDriver is a driver on a machine.
type runningDriver struct {
	mu    sync.Mutex
	calls []driverCall
}

// startDriver starts a driver on a machine, until the test ends or the machine does.
func startDriver(t *testing.T, c *harness.Cluster, machine string, p driverProcess) *runningDriver {
	t.Helper()
	p.Data = c.Spec.DataDir(machine)
	said, err := json.Marshal(p)
	require.NoError(t, err)
	self, err := os.Executable()
	require.NoError(t, err)
	cmd, err := c.Spec.Machine(machine).Command(context.Background(), self)
	require.NoError(t, err)
	cmd.Env = append(os.Environ(), driverEnv+"="+string(said))
	var problems bytes.Buffer
	cmd.Stderr = &problems
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	d := &runningDriver{}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			var call driverCall
			if json.Unmarshal(lines.Bytes(), &call) == nil {
				d.mu.Lock()
				d.calls = append(d.calls, call)
				d.mu.Unlock()
			}
		}
	}()
	t.Cleanup(func() {
		stdin.Close()
		<-read
		err := cmd.Wait()
		if t.Failed() {
			t.Logf("driver %s: %v: %s\ncalls: %+v", p.Name, err, problems.String(), d.calls)
		}
	})
	return d
}

// of are the calls of a method, in order; of all methods if it is empty.
func (d *runningDriver) of(method string) []driverCall {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(d.calls), func(c driverCall) bool { return method != "" && c.Method != method })
}

// driverMounts are the mounts of CSI volumes on a machine, beneath its agent's folder; one
// that is there twice is named twice.
func driverMounts(t *testing.T, c *harness.Cluster, machine string) []string {
	t.Helper()
	data := c.Spec.DataDir(machine) + "/"
	var out []string
	for line := range strings.Lines(c.Run(t, "exec", machine, "--", "cat", "/proc/self/mountinfo")) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		at, below := strings.CutPrefix(f[4], data)
		if below && (strings.HasPrefix(at, "plugins/") || strings.Contains(at, "kubernetes.io~csi")) {
			out = append(out, at)
		}
	}
	slices.Sort(out)
	return out
}
