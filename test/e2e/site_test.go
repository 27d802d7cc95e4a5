//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"timonel/internal/machines"
	"timonel/pki"
	"timonel/test/harness"
	"timonel/test/s3"
)

// block is a code block of the page and the machines it is for.
type block struct{ on, script string }

var blockRE = regexp.MustCompile("(?ms)^```sh ([a-z0-9]+)\n(.*?)^```$")

// readPage returns the page's code blocks by section. Every block says where it
// is to be run.
func readPage(t *testing.T, path string) map[string][]block {
	t.Helper()
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	sections := map[string][]block{}
	for _, section := range strings.Split(string(content), "\n## ")[1:] {
		title, body, _ := strings.Cut(section, "\n")
		for _, m := range blockRE.FindAllStringSubmatch(body, -1) {
			sections[title] = append(sections[title], block{m[1], m[2]})
		}
		require.Equal(t, strings.Count(body, "\n```\n")+strings.Count(body, "\n```sh "), 2*len(sections[title]), "a block of %q does not say where to run it", title)
	}
	return sections
}

// site is some machines with what an operator installs on them.
type site struct {
	count    int
	machines map[string]*machines.Machine
	replace  *strings.Replacer
	bin      string // with the programs, and systemctl
	bundle   *pki.Bundle
	store    *s3.Server
	dir      string
}

// systemctl starts and stops the unit as it stands in deploy/systemd.
const systemctl = `#!/bin/bash
set -eu
[ "$2" = timonel-controller ] || { echo "no unit $2" >&2; exit 1; }
pid=/run/timonel-controller.pid
stop() { [ ! -e $pid ] || { kill $(cat $pid) 2>/dev/null || true; while kill -0 $(cat $pid) 2>/dev/null; do sleep 0.05; done; rm $pid; }; }
start() {
	while IFS= read -r line; do export "$line"; done < /etc/timonel/controller.env
	command=$(sed -n 's|^ExecStart=/usr/local/bin/||p' UNIT)
	eval "exec setsid $command" </dev/null >>/var/lib/timonel/controller.log 2>&1 &
	echo $! > $pid
}
case $1 in start) start ;; stop) stop ;; restart) stop; start ;; *) exit 1 ;; esac
`

// sites is what sites that are there at the same time share.
var sites siteFolders

type siteFolders struct {
	mu   sync.Mutex
	used int
	made []string
	nets int
}

// enter makes the folders that the pages name; what is in them is each machine's
// own. The last site to end removes those that were made.
func (f *siteFolders) enter(t *testing.T) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.used++
	t.Cleanup(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.used--; f.used > 0 {
			return
		}
		for _, dir := range f.made {
			require.NoError(t, os.Remove(dir))
		}
		f.made = nil
	})
	for _, dir := range []string{"/etc/timonel", "/var/lib/timonel", "/var/backups/timonel"} {
		if err := os.Mkdir(dir, 0o700); err == nil {
			f.made = append(f.made, dir)
		} else {
			require.ErrorIs(t, err, os.ErrExist)
		}
	}
}

// network makes a network that no other site has.
func (f *siteFolders) network(t *testing.T) machines.Network {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nets++
	return harness.Network(t, fmt.Sprintf("site%d", f.nets))
}

// newSite sets up that many machines, c1 and so on. c1 to c3 found the cluster.
func newSite(t *testing.T, count int) *site {
	t.Helper()
	sites.enter(t)
	network := sites.network(t)
	s := &site{count: count, machines: map[string]*machines.Machine{}, store: &s3.Server{AccessKey: "timonel-backup"}, dir: t.TempDir()}
	listener, err := net.Listen("tcp", net.JoinHostPort(network.Host().String(), "0"))
	require.NoError(t, err)
	server := &http.Server{Handler: s.store}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	network4 := strings.TrimSuffix(network.Prefix.Addr().String(), "0")
	s.replace = strings.NewReplacer("10.0.0.", network4, "https://s3.example.com", "http://"+listener.Addr().String())

	s.bin = filepath.Join(s.dir, "bin")
	require.NoError(t, os.Mkdir(s.bin, 0o755))
	unit, err := filepath.Abs(filepath.Join("..", "..", "deploy", "systemd", "timonel-controller.service"))
	require.NoError(t, err)
	require.NoError(t, os.Symlink(harness.Program(t, "timonel"), filepath.Join(s.bin, "timonel")))
	require.NoError(t, os.Symlink(harness.Program(t, "controller"), filepath.Join(s.bin, "timonel-controller")))
	require.NoError(t, os.WriteFile(filepath.Join(s.bin, "systemctl"), []byte(strings.ReplaceAll(systemctl, "UNIT", unit)), 0o755))
	bundleDir := filepath.Join(s.dir, "bundle")
	s.bundle, err = pki.CreateBundle(bundleDir)
	require.NoError(t, err)

	for i, name := range s.names() {
		address := netip.MustParseAddr(network4 + strconv.Itoa(11+i))
		m := network.Machine(name, address, filepath.Join(s.dir, name))
		s.machines[name] = m
		t.Cleanup(func() { require.NoError(t, m.PowerOff(context.Background())) })
		t.Cleanup(func() {
			if log, err := os.ReadFile(filepath.Join(m.Dir, "lib", "controller.log")); t.Failed() && err == nil {
				lines := strings.Split(string(log), "\n")
				t.Logf("%s's controller: %s", name, strings.Join(lines[max(0, len(lines)-30):], "\n"))
			}
		})
		for _, dir := range []string{"etc/bundle", "lib", "backups"} {
			require.NoError(t, os.MkdirAll(filepath.Join(m.Dir, dir), 0o700))
		}
		flags := s.replace.Replace(fmt.Sprintf("CONTROLLER_FLAGS=--name=%s --bind-ip=10.0.0.%d --bootstrap-expect=3 --join=10.0.0.11:7946,10.0.0.12:7946,10.0.0.13:7946\n", name, 11+i))
		require.NoError(t, os.WriteFile(filepath.Join(m.Dir, "etc", "controller.env"), []byte(flags), 0o600))
		s.boot(t, name)
		s.run(t, name, fmt.Sprintf("cp -a %s/. /etc/timonel/bundle/", bundleDir))
	}
	return s
}

// boot turns a machine on and mounts its disks.
func (s *site) boot(t *testing.T, name string) {
	t.Helper()
	m := s.machines[name]
	require.NoError(t, m.Boot(t.Context(), harness.Program(t, "machine")))
	s.run(t, name, fmt.Sprintf("mount --bind %[1]s/etc /etc/timonel; mount --bind %[1]s/lib /var/lib/timonel; mount --bind %[1]s/backups /var/backups/timonel; rm -f /run/timonel-controller.pid", m.Dir))
}

func (s *site) names() (names []string) {
	for i := range s.count {
		names = append(names, "c"+strconv.Itoa(i+1))
	}
	return names
}

// section runs a section's blocks where they say.
func (s *site) section(t *testing.T, sections map[string][]block, title string) {
	t.Helper()
	require.NotEmpty(t, sections[title], "the page has no section %q", title)
	for _, b := range sections[title] {
		on := []string{b.on}
		if b.on == "each" {
			on = s.names()
		}
		for _, name := range on {
			t.Logf("on %s:\n%s%s", name, b.script, s.run(t, name, b.script))
		}
	}
}

func (s *site) run(t *testing.T, name, script string) string {
	t.Helper()
	out, err := s.try(t, name, script)
	require.NoError(t, err, "%s: %s\n%s", name, script, out)
	return out
}

// try runs a script as an operator does who is logged in on the machine.
func (s *site) try(t *testing.T, name, script string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd, err := s.machines[name].Command(ctx, "bash", "-e", "-o", "pipefail", "-c", s.replace.Replace(script))
	require.NoError(t, err)
	cmd.Env = []string{"PATH=" + s.bin + ":" + os.Getenv("PATH"), "HOME=/root"}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	return out.String(), err
}

// client reaches the API on one controller, and gives up soon.
func (s *site) client(t *testing.T, name string) *kubernetes.Clientset {
	t.Helper()
	admin, err := s.bundle.ClientCert("e2e", []string{pki.AdminGroup})
	require.NoError(t, err)
	client, err := kubernetes.NewForConfig(&rest.Config{Host: "https://" + s.machines[name].Address.String() + ":6443", QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{CAData: s.bundle.CA(), CertData: admin.Cert, KeyData: admin.Key}})
	require.NoError(t, err)
	return client
}

func (s *site) waitReady(t *testing.T, names ...string) {
	t.Helper()
	if len(names) == 0 {
		names = s.names()
	}
	for _, name := range names {
		client := s.client(t, name)
		harness.Eventually(t, 2*time.Minute, name+" is ready", func() error {
			return client.Discovery().RESTClient().Get().AbsPath("/readyz").Timeout(5 * time.Second).Do(t.Context()).Error()
		})
	}
}
