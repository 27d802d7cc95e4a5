//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/consensus"
	"timonel/test/harness"
)

// members lists the members as `timonel members list -o json` on a machine does.
func (s *site) members(t *testing.T, on string) (list consensus.MemberList, err error) {
	t.Helper()
	address := s.machines[on].Address.String()
	out, err := s.try(t, on, "timonel members list -o json --bundle /etc/timonel/bundle --server https://"+address+":6443")
	if err != nil {
		return list, errors.New(out)
	}
	return list, json.Unmarshal([]byte(out), &list)
}

// waitVoters waits until the members are those given, all healthy voters.
func (s *site) waitVoters(t *testing.T, on string, want ...string) consensus.MemberList {
	t.Helper()
	var list consensus.MemberList
	harness.Eventually(t, time.Minute, fmt.Sprintf("the voters are %v", want), func() (err error) {
		if list, err = s.members(t, on); err != nil {
			return err
		}
		var got []string
		for _, m := range list.Members {
			if m.Healthy && m.Role != "non-voter" {
				got = append(got, m.ID)
			}
		}
		if strings.Join(got, " ") != strings.Join(want, " ") || len(list.Members) != len(want) {
			return fmt.Errorf("%+v", list)
		}
		return nil
	})
	return list
}

// create makes a ConfigMap on a controller.
func (s *site) create(t *testing.T, on, name string) {
	t.Helper()
	configMaps := s.client(t, on).CoreV1().ConfigMaps("default")
	harness.Eventually(t, 30*time.Second, "create "+name, func() error {
		_, err := configMaps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		return err
	})
}

func (s *site) requireThere(t *testing.T, on, name string) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, on+" has "+name, func() error {
		_, err := s.client(t, on).CoreV1().ConfigMaps("default").Get(t.Context(), name, metav1.GetOptions{})
		return err
	})
}

// TestMembersPage follows docs/members.md to the letter, as TestBackupPage does
// docs/backup.md.
func TestMembersPage(t *testing.T) {
	t.Parallel()
	site := newSite(t, 4)
	sections := readPage(t, filepath.Join("..", "..", "docs", "members.md"))
	for _, name := range []string{"c1", "c2", "c3"} {
		site.run(t, name, "systemctl start timonel-controller")
	}
	site.waitReady(t, "c1", "c2", "c3")
	site.waitVoters(t, "c1", "c1", "c2", "c3")
	site.create(t, "c1", "first")

	site.section(t, sections, "See them")
	site.section(t, sections, "Let another lead")
	harness.Eventually(t, 10*time.Second, "c2 leads", func() error {
		if list, err := site.members(t, "c1"); err != nil || list.Leader != "c2" {
			return fmt.Errorf("%+v, %v", list, err)
		}
		return nil
	})

	// c3 dies; neither of the others may be removed.
	require.NoError(t, site.machines["c3"].PowerOff(t.Context()))
	harness.Eventually(t, 30*time.Second, "removing c1 is refused", func() error {
		out, err := site.try(t, "c1", "timonel members remove c1 --bundle /etc/timonel/bundle --server https://10.0.0.11:6443")
		require.Error(t, err)
		if !regexp.MustCompile(`^timonel: members remove: without c1 the cluster would stand still: [^\n]*--force[^\n]*\n$`).MatchString(out) {
			return errors.New(out)
		}
		return nil
	})
	site.section(t, sections, "Replace a controller by one of another name")
	site.waitVoters(t, "c1", "c1", "c2", "c4")
	site.requireThere(t, "c4", "first")

	t.Run("the removed one comes back with its data and says so", func(t *testing.T) {
		site.boot(t, "c3")
		site.run(t, "c3", "systemctl start timonel-controller")
		client := site.client(t, "c3")
		harness.Eventually(t, time.Minute, "c3 says that it was removed", func() error {
			out, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").Param("verbose", "").Do(t.Context()).Raw()
			if err == nil || !strings.Contains(string(out), "[-]member") {
				return fmt.Errorf("%s, %w", out, err)
			}
			return nil
		})
		require.Contains(t, site.run(t, "c3", "cat /var/lib/timonel/controller.log"), "replica c3 was removed from the cluster: stop it; to have it join again, remove /var/lib/timonel/raft")
		site.run(t, "c3", "systemctl stop timonel-controller")
	})

	site.section(t, sections, "Replace a controller by one of the same name")
	site.section(t, sections, "A controller that half joined")
	site.waitVoters(t, "c1", "c1", "c2", "c4")

	t.Run("all addresses change at once", func(t *testing.T) {
		for _, name := range []string{"c1", "c2", "c4"} {
			site.run(t, name, `systemctl stop timonel-controller
				read -r link old < <(ip -o -4 addr show to 10.0.0.0/24 | awk '{print $2, $4}')
				ip addr del $old dev $link
				ip addr add 10.0.0.2${old##*.1} dev $link
				sed -i 's/10.0.0.1/10.0.0.2/g' /etc/timonel/controller.env`)
		}
		for _, name := range []string{"c1", "c2", "c4"} {
			site.run(t, name, "systemctl start timonel-controller")
			m := site.machines[name]
			old := m.Address.As4()
			old[3] += 10
			m.Address = netip.AddrFrom4(old)
		}
		site.waitVoters(t, "c1", "c1", "c2", "c4")
		// Healthy comes first, by gossip's addresses; then the leader records these.
		harness.Eventually(t, 30*time.Second, "the new addresses are recorded", func() error {
			list, err := site.members(t, "c1")
			if err != nil {
				return err
			}
			for _, m := range list.Members {
				if want := site.machines[m.ID].Address.String() + ":7444"; m.Address != want {
					return fmt.Errorf("%s is at %s, not %s", m.ID, m.Address, want)
				}
			}
			return nil
		})
		site.create(t, "c4", "moved")
		site.requireThere(t, "c1", "moved")
	})
}

// TestRecoveryPage follows docs/recovery.md to the letter.
func TestRecoveryPage(t *testing.T) {
	t.Parallel()
	site := newSite(t, 3)
	sections := readPage(t, filepath.Join("..", "..", "docs", "recovery.md"))
	for _, name := range site.names() {
		site.run(t, name, "systemctl start timonel-controller")
	}
	site.waitReady(t)
	site.waitVoters(t, "c1", "c1", "c2", "c3")
	site.create(t, "c2", "kept")
	site.requireThere(t, "c1", "kept")
	before, err := site.client(t, "c1").CoreV1().ConfigMaps("default").Get(t.Context(), "kept", metav1.GetOptions{})
	require.NoError(t, err)
	out, err := site.try(t, "c1", "timonel members recover --data-dir /var/lib/timonel")
	require.Error(t, err)
	require.Regexp(t, `^timonel: members recover: data folder /var/lib/timonel/raft is in use by another process[^\n]*\n$`, out)

	for _, name := range []string{"c2", "c3"} {
		require.NoError(t, site.machines[name].PowerOff(t.Context()))
	}
	harness.Eventually(t, time.Minute, "c1 says that there is no leader", func() error {
		out, err := site.try(t, "c1", "timonel members list --bundle /etc/timonel/bundle --server https://10.0.0.11:6443")
		if err != nil || !strings.Contains(out, "see docs/recovery.md") {
			return errors.New(out)
		}
		return nil
	})
	for _, name := range []string{"c2", "c3"} {
		site.boot(t, name)
		site.run(t, name, "cp -a /var/lib/timonel/raft /var/lib/timonel/raft.lost") // what it comes back with below
	}
	site.section(t, sections, "Recover")
	site.waitVoters(t, "c1", "c1", "c2", "c3")
	for _, name := range site.names() {
		site.requireThere(t, name, "kept")
	}
	after, err := site.client(t, "c3").CoreV1().ConfigMaps("default").Get(t.Context(), "kept", metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, before.UID, after.UID)
	require.Greater(t, revision(t, after.ResourceVersion), revision(t, before.ResourceVersion))

	t.Run("a lost controller that comes back stops", func(t *testing.T) {
		site.run(t, "c3", `systemctl stop timonel-controller
			rm -r /var/lib/timonel/raft
			mv /var/lib/timonel/raft.lost /var/lib/timonel/raft
			systemctl start timonel-controller`)
		stops := func() {
			t.Helper()
			harness.Eventually(t, time.Minute, "c3 stops", func() error {
				_, err := site.try(t, "c3", "! kill -0 $(cat /run/timonel-controller.pid)")
				return err
			})
		}
		stops()
		const why = `/var/lib/timonel/raft is from before the cluster was recovered or restored on %s at [^\n]*: remove it and start again, to join that`
		require.Regexp(t, fmt.Sprintf(why, "replica c[12]"), site.run(t, "c3", "cat /var/lib/timonel/controller.log"))
		site.run(t, "c3", "systemctl restart timonel-controller")
		stops()
		require.Regexp(t, "^controller: "+fmt.Sprintf(why, "another replica")+"\n$", site.run(t, "c3", "tail -n 1 /var/lib/timonel/controller.log"))
		site.run(t, "c3", "rm -r /var/lib/timonel/raft; systemctl restart timonel-controller")
		site.waitVoters(t, "c1", "c1", "c2", "c3")
	})
}
