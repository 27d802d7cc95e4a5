package desired

import (
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	return s
}

func set(t *testing.T, s *Store, revision int64, uids ...string) {
	t.Helper()
	for _, uid := range uids {
		raw, err := (&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "pod-" + uid, Namespace: "ns", UID: types.UID(uid)}}).Marshal()
		require.NoError(t, err)
		require.NoError(t, s.SetPod(raw, revision, 0))
	}
}

func uids(s *Store) string {
	var out []string
	for _, p := range s.Pods() {
		out = append(out, string(p.UID))
	}
	sort.Strings(out)
	return strings.Join(out, " ")
}

func TestStoreOutlivesItsProcess(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "desired")
	s := open(t, dir)
	s.Begin("cluster", true)
	raw, err := (&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s", Namespace: "ns"}, Data: map[string][]byte{"k": []byte("v")}}).Marshal()
	require.NoError(t, err)
	require.NoError(t, s.SetObject(KindSecret, raw, 3))
	raw, err = (&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}}).Marshal()
	require.NoError(t, err)
	require.NoError(t, s.SetObject(KindVolume, raw, 4))
	set(t, s, 5, "a", "b")
	s.Synced(9)
	s.RemovePod("b", 11)
	set(t, s, 12, "c")
	s.SetStatus("a", &corev1.PodStatus{Phase: corev1.PodFailed})
	require.NoError(t, s.Close())

	s = open(t, dir)
	require.Equal(t, "a c", uids(s))
	secret, ok := s.Secret("ns", "s")
	require.True(t, ok)
	_, ok = s.PersistentVolume("pv")
	require.True(t, ok)
	require.Len(t, s.PersistentVolumes(), 1)
	require.Equal(t, "v", string(secret.Data["k"]))
	st, ok := s.Status("a")
	require.True(t, ok)
	require.Equal(t, corev1.PodFailed, st.Phase)
	epoch, revision := s.Position()
	require.Equal(t, "cluster", epoch)
	require.EqualValues(t, 9, revision, "the position that was last written as whole")
	require.Nil(t, s.Have(), "a new process asks for a full list")
	require.NoError(t, s.Close())
	info, err := os.Stat(filepath.Join(dir, "objects", "Secret", "ns", "s"))
	require.NoError(t, err)
	require.EqualValues(t, 0o600, info.Mode().Perm())
}

// Only the first batch of a stream makes the agent look for what was removed meanwhile, and
// try all again that was put off: others come with each status that it reports.
func TestSyncedAnew(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	defer s.Close()
	var anew []bool
	s.Observe(Observer{Synced: func(n bool) { anew = append(anew, n) }})
	for _, full := range []bool{true, false} {
		s.Begin("cluster", full)
		for i := range 3 {
			set(t, s, int64(5+i), "a")
			s.Synced(int64(5 + i))
		}
	}
	require.Equal(t, []bool{true, false, false, true, false, false}, anew)
}

func TestFullListRemovesWhatItDoesNotName(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	defer s.Close()
	var removed, changed []string
	s.Observe(Observer{
		PodRemoved:    func(p *corev1.Pod) { removed = append(removed, string(p.UID)) },
		ObjectChanged: func(kind, ns, name string) { changed = append(changed, kind+" "+ns+"/"+name) },
	})
	s.Begin("cluster", true)
	raw, err := (&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "cm", Namespace: "ns"}}).Marshal()
	require.NoError(t, err)
	require.NoError(t, s.SetObject(KindConfigMap, raw, 3))
	set(t, s, 5, "a", "b")
	s.Synced(5)

	t.Log("a list that breaks off removes nothing and cannot be resumed from")
	s.Begin("cluster", true)
	set(t, s, 7, "b")
	_, revision := s.Position()
	require.Zero(t, revision)
	require.Equal(t, "a b", uids(s))

	changed = nil
	s.Begin("cluster", true)
	set(t, s, 8, "b", "c")
	s.Synced(8)
	require.Equal(t, "b c", uids(s))
	require.Equal(t, []string{"a"}, removed)
	require.Equal(t, []string{"ConfigMap ns/cm"}, changed)

	t.Log("changes after it count at once")
	s.Begin("cluster", false)
	set(t, s, 9, "d")
	_, revision = s.Position()
	require.EqualValues(t, 9, revision)
	require.Equal(t, "b c d", uids(s))
}

// Whatever is wrong with a file, the store opens, and the full list that follows
// puts it right, on the disk too.
func TestDamagedFilesCostAFullList(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, file string
		content    string // "/": a folder
	}{
		{"a truncated pod", "pods/a", "\x0a\xff"},
		{"an empty pod", "pods/a", ""},
		{"a pod under another's name", "pods/stranger", "x"},
		{"a folder in a pod's place", "pods/a/x", "x"},
		{"a position that is no JSON", positionFile, "{"},
		{"a folder in the position's place", positionFile, "/"},
		{"an object of no known kind", "objects/Widget/ns/x", "x"},
		{"a truncated object", "objects/ConfigMap/ns/cm", "\x0a\xff"},
		{"what an earlier agent left in the middle of a write", "objects/ConfigMap/ns/cm.new", "\x0a\xff"},
		{"what this agent left in the middle of a write", newDir + "/" + newFile, "x"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := open(t, dir)
			cm, err := (&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "cm", Namespace: "ns"}}).Marshal()
			require.NoError(t, err)
			fill := func() {
				s.Begin("cluster", true)
				require.NoError(t, s.SetObject(KindConfigMap, cm, 4))
				set(t, s, 5, "a", "b")
				s.Synced(5)
			}
			fill()
			require.NoError(t, s.Close())
			path := filepath.Join(dir, tc.file)
			if parent := filepath.Dir(path); parent != dir {
				_ = os.Remove(parent) // if it is a file
				require.NoError(t, os.MkdirAll(parent, 0o700))
			}
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			if tc.content == "/" {
				require.NoError(t, os.Mkdir(path, 0o700))
			} else {
				require.NoError(t, os.WriteFile(path, []byte(tc.content), 0o600))
			}
			s = open(t, dir)
			require.Contains(t, uids(s), "b")
			require.Nil(t, s.Have())
			fill()
			require.NoError(t, s.Close())
			s = open(t, dir)
			defer s.Close()
			require.Equal(t, "a b", uids(s))
			_, ok := s.ConfigMap("ns", "cm")
			require.True(t, ok)
			epoch, revision := s.Position()
			require.Equal(t, "cluster", epoch)
			require.EqualValues(t, 5, revision)
			require.Empty(t, s.stray, "nothing damaged is left")
		})
	}
}

// Names that files of the store itself have, or had, or are as long as can be, are
// names of objects too.
func TestAnyName(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	s.Begin("cluster", true)
	names := []string{"settings", "settings.new", positionFile, "new", "file", "pods", strings.Repeat("x", 253)}
	for _, name := range names {
		raw, err := (&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "status"}, Data: map[string]string{"name": name}}).Marshal()
		require.NoError(t, err)
		require.NoError(t, s.SetObject(KindConfigMap, raw, 3))
	}
	s.Synced(3)
	require.NoError(t, s.Close())
	s = open(t, dir)
	defer s.Close()
	for _, name := range names {
		cm, ok := s.ConfigMap("status", name)
		require.True(t, ok, name)
		require.Equal(t, name, cm.Data["name"])
	}
}
