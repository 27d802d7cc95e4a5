package containerd

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	"timonel/agent/hostile"
	"timonel/internal/durable"
)

// DefaultHandler is the runtime of pods that ask for none.
const DefaultHandler = "runc"

// shimType is what containerd makes a shim's name of.
var shimType = regexp.MustCompile(`^[a-z0-9]+(\.[a-z0-9]+)+\.v[0-9]+$`)

// CheckHandler says what is wrong with one of [DaemonConfig.Handlers].
func CheckHandler(name, program string) error {
	switch errs := validation.IsDNS1123Label(name); {
	case len(errs) > 0:
		return fmt.Errorf("name %q: %s", name, errs[0])
	case reserved[name]:
		return fmt.Errorf("name %q is the agent's own", name)
	case shimType.MatchString(program):
		return nil
	case !filepath.IsAbs(program):
		return fmt.Errorf("%q is neither the path of a program nor the type of a shim such as io.containerd.runsc.v1", program)
	}
	if _, err := exec.LookPath(program); err != nil {
		return fmt.Errorf("%s is no program that can be run: %w", program, err)
	}
	return nil
}

// reserved are names that a handler cannot have: runc's own, and those of folders beside its.
var reserved = map[string]bool{DefaultHandler: true, "root": true, "state": true, "opt": true}

// Namespace is the containerd namespace that CRI and therefore the agent uses.
const Namespace = "k8s.io"

// maxSocketPath is one less than what sockaddr_un holds on Linux, minus the
// suffix ".ttrpc" that containerd adds for its second socket.
const maxSocketPath = 107 - len(".ttrpc")

// DaemonConfig says where a supervised containerd keeps its files and how it
// treats images and the pod network.
type DaemonConfig struct {
	// Dir is the folder that containerd's root, state, socket, configuration,
	// pid file and log are under. It must be on a file system that overlayfs
	// can use as an upper layer.
	Dir string
	// Binary is the containerd to run. Default: "containerd" from PATH. Its shim and runc
	// are those beside it, if it is given by path, else those of PATH.
	Binary string
	// PauseImage is the sandbox image. It must have been imported, or be in a
	// registry that this machine reaches.
	PauseImage string
	// CNIConfDir and CNIBinDirs are where the pod network's configuration and
	// plugins are. containerd 1.x takes one plugin folder, the first.
	CNIConfDir string
	CNIBinDirs []string
	// RegistryDir holds HOST/hosts.toml files (mirrors, plain http, CAs), in
	// containerd's own format. Default: Dir/certs.d.
	RegistryDir string
	// Handlers are runtimes beside runc that pods may ask for by a RuntimeClass, by
	// name: a program that is called as runc is, by its path, or the type of a
	// containerd shim, such as io.containerd.runsc.v1.
	Handlers map[string]string
	// Logger gets the supervisor's messages; containerd's own go to Dir/containerd.log.
	Logger *slog.Logger
}

// Validate names the first field that cannot work.
func (c *DaemonConfig) Validate() error {
	switch {
	case c.Dir == "" || !filepath.IsAbs(c.Dir):
		return fmt.Errorf("containerd: Dir must be an absolute path, is %q", c.Dir)
	case c.PauseImage == "":
		return errors.New("containerd: PauseImage is empty")
	case c.CNIConfDir == "":
		return errors.New("containerd: CNIConfDir is empty")
	case len(c.CNIBinDirs) == 0:
		return errors.New("containerd: CNIBinDirs is empty")
	}
	for name, program := range c.Handlers {
		if err := CheckHandler(name, program); err != nil {
			return fmt.Errorf("containerd: Handlers: %w", err)
		}
	}
	return nil
}

// paths of one containerd, all derived from its folder.
type paths struct {
	root, state, socket, config, pid, log, registry string
}

func (c *DaemonConfig) paths() paths {
	p := paths{
		root:     filepath.Join(c.Dir, "root"),
		state:    filepath.Join(c.Dir, "state"),
		socket:   filepath.Join(c.Dir, "containerd.sock"),
		config:   filepath.Join(c.Dir, "config.toml"),
		pid:      filepath.Join(c.Dir, "containerd.pid"),
		log:      filepath.Join(c.Dir, "containerd.log"),
		registry: c.RegistryDir,
	}
	if p.registry == "" {
		p.registry = filepath.Join(c.Dir, "certs.d")
	}
	// A socket's path is limited to 107 bytes; a deep data folder gets its
	// socket under /run, in a folder named after it.
	if len(p.socket) > maxSocketPath {
		sum := sha256.Sum256([]byte(c.Dir))
		p.socket = filepath.Join("/run/timonel", hex.EncodeToString(sum[:8]), "containerd.sock")
	}
	return p
}

// render returns config.toml. Version 2 is read by containerd 1.3 to 2.x, which makes
// its own version of it.
func (c *DaemonConfig) render() []byte {
	p := c.paths()
	q := strconv.Quote
	var b bytes.Buffer
	w := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	w("# Written by the Timonel agent at every start; changes here are lost.")
	w("version = 2")
	w("root = %s", q(p.root))
	w("state = %s", q(p.state))
	protect := mayLowerOOMScore()
	if protect {
		w("oom_score = -999")
	}
	w("disabled_plugins = [")
	// What the agent does not use costs start time and log lines.
	for _, id := range []string{
		"io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
		"io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
		"io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs",
		"io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",
		"io.containerd.nri.v1.nri",
	} {
		w("  %s,", q(id))
	}
	w("]")
	w("[grpc]")
	w("  address = %s", q(p.socket))
	w("[debug]")
	w("  level = \"info\"")
	w("[plugins.\"io.containerd.internal.v1.opt\"]")
	w("  path = %s", q(filepath.Join(c.Dir, "opt")))
	w("[plugins.\"io.containerd.grpc.v1.cri\"]")
	w("  sandbox_image = %s", q(c.PauseImage))
	w("  disable_tcp_service = true")
	w("  stream_server_address = \"127.0.0.1\"")
	w("  stream_server_port = \"0\"")
	w("  netns_mounts_under_state_dir = true")
	w("  tolerate_missing_hugetlb_controller = true")
	w("  disable_hugetlb_controller = true")
	w("  restrict_oom_score_adj = %t", !protect)
	w("  enable_unprivileged_ports = true")
	w("  enable_unprivileged_icmp = true")
	w("  enable_criu = false") // an image could be a checkpoint of processes, which would be restored
	w("  [plugins.\"io.containerd.grpc.v1.cri\".cni]")
	w("    conf_dir = %s", q(c.CNIConfDir))
	w("    bin_dir = %s", q(c.CNIBinDirs[0]))
	w("    max_conf_num = 1")
	w("  [plugins.\"io.containerd.grpc.v1.cri\".registry]")
	w("    config_path = %s", q(p.registry))
	w("  [plugins.\"io.containerd.grpc.v1.cri\".containerd]")
	w("    snapshotter = \"overlayfs\"")
	w("    default_runtime_name = \"runc\"")
	handler := func(name, program string) {
		const runc = "io.containerd.runc.v2"
		table := "plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes." + q(name)
		w("    [%s]", table)
		if program != "" && !filepath.IsAbs(program) {
			w("      runtime_type = %s", q(program))
			return // its options are its own
		}
		w("      runtime_type = %s", q(runc))
		w("      [%s.options]", table)
		w("        Root = %s", q(filepath.Join(c.Dir, name)))
		w("        SystemdCgroup = false")
		if program != "" {
			w("        BinaryName = %s", q(program))
		}
	}
	handler(DefaultHandler, "")
	for _, name := range slices.Sorted(maps.Keys(c.Handlers)) {
		handler(name, c.Handlers[name])
	}
	return b.Bytes()
}

// mayLowerOOMScore says whether this process, and so containerd and runc, may
// protect a process from the kernel's out-of-memory killer. In a container or
// a restricted machine root may lack the capability (CAP_SYS_RESOURCE), and
// runc then fails to start what asks for it.
func mayLowerOOMScore() bool {
	const path = "/proc/self/oom_score_adj"
	raw, err := hostile.ReadRegular(path, hostile.MaxOwn)
	if err != nil {
		return false
	}
	score, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || score <= -999 {
		return err == nil
	}
	if os.WriteFile(path, []byte(strconv.Itoa(-999)), 0o644) != nil {
		return false
	}
	return os.WriteFile(path, raw, 0o644) == nil
}

// write makes the folders and the configuration file.
func (c *DaemonConfig) write() error {
	p := c.paths()
	for _, dir := range []string{c.Dir, p.root, p.state, p.registry, filepath.Dir(p.socket), c.CNIConfDir} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return fmt.Errorf("make containerd's folder: %w", err)
		}
	}
	if err := durable.WriteFile(p.config, c.render(), 0o600); err != nil {
		return fmt.Errorf("write containerd's configuration: %w", err)
	}
	return nil
}
