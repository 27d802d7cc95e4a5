//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"timonel/internal/machines"
	"timonel/pki"
	"timonel/test/harness"
	"timonel/test/s3"
)

// TestBackupPage follows docs/backup.md to the letter: its code blocks run on
// three machines that are set up as deploy/systemd says, with a few lines of
// shell for systemctl. Two things are replaced: the first three numbers of the
// addresses, and the S3 store.
func TestBackupPage(t *testing.T) {
	t.Parallel()
	site := newSite(t)
	sections := readPage(t, filepath.Join("..", "..", "docs", "backup.md"))
	for _, name := range site.names() {
		site.run(t, name, "systemctl start timonel-controller")
	}
	client := site.client(t, "c1")
	site.waitReady(t)
	ctx := t.Context()
	configMaps := client.CoreV1().ConfigMaps("default")
	create := func(name, value string) *corev1.ConfigMap {
		t.Helper()
		var made *corev1.ConfigMap
		harness.Eventually(t, 30*time.Second, "create "+name, func() (err error) {
			made, err = configMaps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"v": value}}, metav1.CreateOptions{})
			return err
		})
		return made
	}
	kept, changed, deleted := create("kept", "1"), create("changed", "before"), create("deleted", "1")

	site.section(t, sections, "Save a snapshot by hand")
	t.Run("a file that is cut short or altered is refused", func(t *testing.T) { site.requireDamageRefused(t) })

	// What comes after the snapshot will be lost.
	lost := create("lost", "1")
	changed.Data["v"] = "after"
	changed, err := configMaps.Update(ctx, changed, metav1.UpdateOptions{})
	require.NoError(t, err)
	require.NoError(t, configMaps.Delete(ctx, "deleted", metav1.DeleteOptions{}))
	list, err := configMaps.List(ctx, metav1.ListOptions{})
	require.NoError(t, err)
	require.Greater(t, revision(t, list.ResourceVersion), revision(t, lost.ResourceVersion))

	page, err := configMaps.List(ctx, metav1.ListOptions{Limit: 1})
	require.NoError(t, err)
	require.NotEmpty(t, page.Continue)

	informer := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace("default")).Core().V1().ConfigMaps()
	go informer.Informer().Run(ctx.Done())
	harness.Eventually(t, time.Minute, "the informer knows what will be lost", func() error {
		_, err := informer.Lister().ConfigMaps("default").Get("lost")
		return err
	})

	site.section(t, sections, "Save snapshots on a schedule")
	require.NotEmpty(t, site.store.Keys())
	require.Regexp(t, `^backups/prod/timonel-.*\.snapshot$`, site.store.Keys()[0])

	site.section(t, sections, "Restore")
	site.waitReady(t)
	t.Run("the state is the snapshot's, with greater revisions", func(t *testing.T) {
		for _, want := range []*corev1.ConfigMap{kept, deleted} {
			got, err := configMaps.Get(ctx, want.Name, metav1.GetOptions{})
			require.NoError(t, err)
			require.Equal(t, want.UID, got.UID)
			require.Greater(t, revision(t, got.ResourceVersion), revision(t, list.ResourceVersion))
		}
		got, err := configMaps.Get(ctx, "changed", metav1.GetOptions{})
		require.NoError(t, err)
		require.Equal(t, "before", got.Data["v"])
		_, err = configMaps.Get(ctx, "lost", metav1.GetOptions{})
		require.True(t, apierrors.IsNotFound(err), "%v", err)
	})
	t.Run("an old watch gets 410, an old condition a conflict", func(t *testing.T) {
		for _, name := range site.names() {
			requireExpired(t, site.client(t, name), list.ResourceVersion)
		}
		_, err := configMaps.List(ctx, metav1.ListOptions{Limit: 1, Continue: page.Continue})
		require.True(t, apierrors.IsResourceExpired(err), "the next page of an old list: %v", err)
		_, err = configMaps.List(ctx, metav1.ListOptions{ResourceVersion: list.ResourceVersion, ResourceVersionMatch: metav1.ResourceVersionMatchExact})
		require.True(t, apierrors.IsResourceExpired(err), "a list at an old revision: %v", err)
		_, err = configMaps.Update(ctx, changed, metav1.UpdateOptions{})
		require.True(t, apierrors.IsConflict(err), "%v", err)
	})
	t.Run("an informer from before lists again", func(t *testing.T) {
		harness.Eventually(t, 2*time.Minute, "the informer has the restored state", func() error {
			var names []string
			cached, err := informer.Lister().ConfigMaps("default").List(labels.Everything())
			for _, c := range cached {
				if c.Name == "changed" && c.Data["v"] != "before" {
					return errors.New("it has an object from the lost cluster")
				}
				names = append(names, c.Name)
			}
			if slices.Contains(names, "lost") || !slices.Contains(names, "deleted") {
				return fmt.Errorf("it has %v", names)
			}
			return err
		})
		create("after", "1")
		harness.Eventually(t, time.Minute, "and goes on watching", func() error {
			_, err := informer.Lister().ConfigMaps("default").Get("after")
			return err
		})
	})
	t.Run("a folder with data is refused", func(t *testing.T) {
		out, err := site.try(t, "c1", "timonel snapshot restore /var/backups/timonel/today.snapshot --data-dir /var/lib/timonel --bundle /etc/timonel/bundle --name c1")
		require.Error(t, err)
		require.Regexp(t, `^timonel: .*/var/lib/timonel/raft holds data already[^\n]*\n$`, out)
	})
}

// requireExpired watches after an old revision: the answer is 410, at once or as
// the first event.
func requireExpired(t *testing.T, client *kubernetes.Clientset, old string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	w, err := client.CoreV1().ConfigMaps("default").Watch(ctx, metav1.ListOptions{ResourceVersion: old})
	if err == nil {
		defer w.Stop()
		event, ok := <-w.ResultChan()
		require.True(t, ok, "the watch ends without a word")
		require.Equal(t, watch.Error, event.Type)
		err = apierrors.FromObject(event.Object)
	}
	require.True(t, apierrors.IsResourceExpired(err) || apierrors.IsGone(err), "%v", err)
}

func revision(t *testing.T, resourceVersion string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(resourceVersion, 10, 64)
	require.NoError(t, err)
	return n
}

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

// site is three machines with what an operator installs on them.
type site struct {
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

func newSite(t *testing.T) *site {
	t.Helper()
	// The folders' names are the page's; what is in them is each machine's own.
	for _, dir := range []string{"/etc/timonel", "/var/lib/timonel", "/var/backups/timonel"} {
		if err := os.Mkdir(dir, 0o700); err == nil {
			t.Cleanup(func() { require.NoError(t, os.Remove(dir)) })
		} else {
			require.ErrorIs(t, err, os.ErrExist)
		}
	}
	var candidates []netip.Prefix
	for i := range 100 {
		candidates = append(candidates, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 80, byte(i), 0}), 24))
	}
	prefix, err := machines.FreePrefix(candidates)
	require.NoError(t, err)
	network := machines.Network{Name: "backup-" + strconv.Itoa(os.Getpid()), Prefix: prefix}
	t.Cleanup(func() { require.NoError(t, network.Delete()) })
	require.NoError(t, network.Create())

	s := &site{machines: map[string]*machines.Machine{}, store: &s3.Server{AccessKey: "timonel-backup"}, dir: t.TempDir()}
	listener, err := net.Listen("tcp", net.JoinHostPort(network.Host().String(), "0"))
	require.NoError(t, err)
	server := &http.Server{Handler: s.store}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	network4 := strings.TrimSuffix(prefix.Masked().Addr().String(), "0")
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
		require.NoError(t, m.Boot(t.Context(), harness.Program(t, "machine")))
		for _, dir := range []string{"etc/bundle", "lib", "backups"} {
			require.NoError(t, os.MkdirAll(filepath.Join(m.Dir, dir), 0o700))
		}
		flags := s.replace.Replace(fmt.Sprintf("CONTROLLER_FLAGS=--name=%s --bind-ip=10.0.0.%d --bootstrap-expect=3 --join=10.0.0.11:7946,10.0.0.12:7946,10.0.0.13:7946\n", name, 11+i))
		require.NoError(t, os.WriteFile(filepath.Join(m.Dir, "etc", "controller.env"), []byte(flags), 0o600))
		s.run(t, name, fmt.Sprintf("mount --bind %[1]s/etc /etc/timonel; mount --bind %[1]s/lib /var/lib/timonel; mount --bind %[1]s/backups /var/backups/timonel; cp -a %[2]s/. /etc/timonel/bundle/", m.Dir, bundleDir))
	}
	return s
}

func (s *site) names() []string { return []string{"c1", "c2", "c3"} }

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

func (s *site) waitReady(t *testing.T) {
	t.Helper()
	for _, name := range s.names() {
		client := s.client(t, name)
		harness.Eventually(t, 2*time.Minute, name+" is ready", func() error {
			return client.Discovery().RESTClient().Get().AbsPath("/readyz").Timeout(5 * time.Second).Do(t.Context()).Error()
		})
	}
}

func (s *site) requireDamageRefused(t *testing.T) {
	t.Helper()
	folder := filepath.Join(s.machines["c1"].Dir, "backups")
	whole, err := os.ReadFile(filepath.Join(folder, "today.snapshot"))
	require.NoError(t, err)
	altered := bytes.Clone(whole)
	altered[len(altered)/3] ^= 1
	for _, bad := range [][]byte{whole[:len(whole)-1], altered} {
		require.NoError(t, os.WriteFile(filepath.Join(folder, "bad.snapshot"), bad, 0o600))
		for _, command := range []string{"inspect", "restore --data-dir /var/backups/timonel/nowhere --bundle /etc/timonel/bundle --name c1"} {
			out, err := s.try(t, "c1", "timonel snapshot "+command+" /var/backups/timonel/bad.snapshot")
			require.Error(t, err)
			require.Regexp(t, `^timonel: [^\n]*/var/backups/timonel/bad.snapshot: the snapshot file is damaged[^\n]*\n$`, out)
		}
		left, err := filepath.Glob(filepath.Join(folder, "nowhere", "*"))
		require.NoError(t, err)
		require.Empty(t, left)
	}
}
