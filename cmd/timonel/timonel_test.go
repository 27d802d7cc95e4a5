package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"timonel/internal/cluster"
	"timonel/internal/machines"
	"timonel/pki"
)

func TestCommandLineErrors(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"unknown flag":      {[]string{"up", "--nonsense"}, "timonel up --help"},
		"unknown command":   {[]string{"nonsense"}, "nonsense"},
		"no machine":        {[]string{"kill"}, "name a machine"},
		"no cluster":        {[]string{"kill", "c1"}, "timonel up"},
		"no cluster's logs": {[]string{"logs", "c1"}, "timonel up"},
		"two logs":          {[]string{"logs", "c1", "c2"}, "one machine"},
		"output":            {[]string{"status", "-o", "yaml"}, "table or json"},
		"token output":      {[]string{"token", "list", "-o", "yaml"}, "table or json"},
		"node output":       {[]string{"node", "list", "-o", "yaml"}, "table or json"},
		"subnet":            {[]string{"up", "--subnet", "here"}, "--subnet"},
		"no snapshot file":  {[]string{"snapshot", "save"}, "name one file"},
		"no such snapshot":  {[]string{"snapshot", "inspect", "/nowhere.snapshot"}, "/nowhere.snapshot: no such file"},
		"snapshot output":   {[]string{"snapshot", "inspect", "f", "-o", "yaml"}, "table or json"},
		"no cluster to ask": {[]string{"snapshot", "save", "f", "--kubeconfig", "/nowhere"}, "/nowhere"},
		"half an access":    {[]string{"snapshot", "list", "--server", "https://c1:6443"}, "--bundle and --server go together"},
		"restore to where":  {[]string{"snapshot", "restore", "f"}, "is required"},
		"restore, address":  {[]string{"snapshot", "restore", "f", "--data-dir=d", "--bundle=b", "--name=c1", "--raft-address=c1"}, "--raft-address"},
		"restore backwards": {[]string{"snapshot", "restore", "f", "--data-dir=d", "--bundle=b", "--name=c1", "--bump-revision=-1"}, "--bump-revision"},
		"bundle":            {[]string{"init"}, "--bundle"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := command()
			root.SetArgs(append(tc.args, "--run", t.TempDir()))
			root.SetOut(io.Discard)
			require.ErrorContains(t, root.Execute(), tc.want)
		})
	}
}

func TestKubectlTakesRunForItself(t *testing.T) {
	t.Parallel()
	root, dir := command(), t.TempDir()
	root.SetArgs([]string{"--run", dir, "kubectl", "get", "namespaces"})
	require.ErrorContains(t, root.Execute(), "no cluster in "+dir)
}

func TestInitMakesABundleOnce(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "bundle")
	var out bytes.Buffer
	for i, want := range []string{"", "not empty"} {
		root := command()
		root.SetArgs([]string{"init", "--bundle", dir})
		root.SetOut(&out)
		err := root.Execute()
		if i == 0 {
			require.NoError(t, err)
		} else {
			require.ErrorContains(t, err, want)
		}
	}
	bundle, err := pki.LoadBundle(dir)
	require.NoError(t, err)
	require.Contains(t, out.String(), bundle.ClusterID())
}

func TestTail(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log")
	require.NoError(t, os.WriteFile(path, []byte("one\ntwo\nthree\n"), 0o600))
	for tail, want := range map[int]string{-1: "one\ntwo\nthree\n", 0: "", 1: "three\n", 2: "two\nthree\n", 9: "one\ntwo\nthree\n"} {
		var out bytes.Buffer
		require.NoError(t, printLog(t.Context(), &out, path, tail, false))
		require.Equal(t, want, out.String(), "--tail %d", tail)
	}
	require.ErrorContains(t, printLog(t.Context(), io.Discard, path+"x", -1, false), "has not been started")
}

func TestProgressOnAPipeIsPlain(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	p := &progress{out: &out}
	p.Start("controllers")
	p.Done("controllers after %d s", 2)
	require.Equal(t, "… controllers\n✓ controllers after 2 s\n", out.String())
}

func TestStatusTable(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	s := &cluster.Status{Version: 2, Cluster: "timonel", Leader: "c2", Term: 3, API: "https://10.77.0.1:6443", Kubeconfig: "run/kubeconfig",
		Controllers: []cluster.ControllerStatus{
			{MachineStatus: cluster.MachineStatus{Name: "c1", Address: "10.77.0.11", State: "ended", Exited: "killed by SIGKILL"}},
			{MachineStatus: cluster.MachineStatus{Name: "c2", Address: "10.77.0.12", State: "running", Started: now.Add(-time.Minute)},
				Answers: true, Role: "leader", Leader: "c2", Term: 3, CommitIndex: 120, AppliedIndex: 118, Revision: 345,
				Fsync: 812 * time.Microsecond, Agents: []string{"a1"}, Memory: machines.Memory{Resident: 180 << 20},
				Members: []cluster.MemberStatus{{Name: "c2", State: "alive"}, {Name: "c1", State: "dead"}}},
		},
		Nodes: []cluster.NodeStatus{{MachineStatus: cluster.MachineStatus{Name: "a1", Address: "10.77.0.101", State: "running", Started: now.Add(-time.Minute)},
			Reason: "NodeStatusUnknown: gone", PodCIDR: "10.244.0.0/24", StreamTo: "c2", Version: "v1.37.2", Pods: 2}},
		Pods: cluster.PodCounts{Total: 3, Ready: 2, Pending: 1}, Cuts: []string{"c1 -> c2"},
		Expiries: []cluster.Expiry{
			{What: "node a1", Kind: "node", At: now.Add(-time.Minute)}, {What: "join token 1f2e", Kind: "token", At: now.Add(23 * time.Hour)},
			{What: "CA", Kind: "authority", At: now.Add(3650 * 24 * time.Hour)},
		}, Problems: []string{"c1 does not answer"}}
	var out bytes.Buffer
	require.NoError(t, printStatus(&out, s, now))
	want := `Cluster timonel (version 2): c2 leads in term 3. 3 pods, 2 ready, 1 pending.
API https://10.77.0.1:6443, kubeconfig run/kubeconfig

CONTROLLER  ADDRESS     STATE                      ROLE    TERM  APPLIED   REVISION  AGENTS  MEMORY  FSYNC  FOR
c1          10.77.0.11  ended (killed by SIGKILL)  -       -     -         -         -       -       -      -
c2          10.77.0.12  running                    leader  3     118 (-2)  345       a1      180 MB  810µs  1m0s

NODE  ADDRESS      STATE    READY                  PODS  POD NETWORK    STREAM TO  VERSION  FOR
a1    10.77.0.101  running  no: NodeStatusUnknown  2     10.244.0.0/24  c2         v1.37.2  1m0s

EXPIRES               IN         WHAT
2026-11-23T11:59:00Z  expired    node a1
2026-11-24T11:00:00Z  23 hours   join token 1f2e
2036-11-20T12:00:00Z  3650 days  CA

Gossip, as c2 sees it: c2 alive, c1 dead
Cut links: c1 -> c2
! c1 does not answer
`
	require.Equal(t, want, out.String(), strings.ReplaceAll(out.String(), " ", "·"))
}
