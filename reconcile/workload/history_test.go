package workload_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"timonel/reconcile"
	"timonel/reconcile/storytest"
	"timonel/reconcile/workload"
)

// historyTemplate is the template whose revision Kubernetes 1.37.2 makes as told below.
func historyTemplate(image string) *corev1.PodTemplateSpec {
	user, grace := int64(1000650000), int64(10)
	return &corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web"}, Annotations: map[string]string{"say": "<a&b>"}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace,
			SecurityContext:               &corev1.PodSecurityContext{RunAsUser: &user},
			Containers:                    []corev1.Container{{Name: "c", Image: image}},
		},
	}
}

func mustData(t *testing.T, template *corev1.PodTemplateSpec) []byte {
	data, err := workload.RevisionData(template)
	require.NoError(t, err)
	return data
}

// A revision's data, and the hash in its name, are those that Kubernetes makes: a
// cluster that moves over must not restart its pods.
func TestRevisionIsUpstreams(t *testing.T) {
	t.Parallel()
	data := mustData(t, historyTemplate("v1"))
	require.Equal(t, `{"spec":{"template":{"$patch":"replace","metadata":{"annotations":{"say":"\u003ca\u0026b\u003e"},"labels":{"app":"web"}},`+
		`"spec":{"containers":[{"image":"v1","name":"c","resources":{}}],"securityContext":{"runAsUser":1000650000},"terminationGracePeriodSeconds":10}}}}`, string(data))
	require.Equal(t, "web-6f44bdc8b", workload.RevisionName("web", workload.DataHash(data, 0)))
	require.Equal(t, "6f44bdc8c", workload.DataHash(data, 1))
	require.Len(t, workload.RevisionName(strings.Repeat("x", 253), "6f44bdc8b"), 223+1+9)

	back, err := workload.RevisionTemplate(&appsv1.ControllerRevision{Data: runtime.RawExtension{Raw: data}})
	require.NoError(t, err)
	require.Equal(t, historyTemplate("v1"), back)

	_, err = workload.RevisionTemplate(&appsv1.ControllerRevision{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web-1"}, Data: runtime.RawExtension{Raw: []byte(`{"spec":7}`)}})
	require.ErrorContains(t, err, "controller revision default/web-1: data")
}

// past is a world with an owner and revisions of it.
type past struct {
	*storytest.World
	t     *testing.T
	owner *appsv1.StatefulSet
}

func newPast(t *testing.T) *past {
	owner := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", UID: "owner", Annotations: map[string]string{"note": "n"}}}
	owner.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}
	return &past{World: storytest.NewWorld(t), t: t, owner: owner}
}

// revision adds a revision of data; owner "" is nobody.
func (p *past) revision(name string, number int64, data []byte, owner types.UID, labels map[string]string) {
	rev := &appsv1.ControllerRevision{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: labels},
		Data:       runtime.RawExtension{Raw: data}, Revision: number,
	}
	if owner != "" {
		o := p.owner.DeepCopy()
		o.UID = owner
		rev.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(o, reconcile.StatefulSetKind)}
	}
	p.Add(rev)
}

func (p *past) history(release bool) workload.History {
	selector, err := metav1.LabelSelectorAsSelector(p.owner.Spec.Selector)
	require.NoError(p.t, err)
	return workload.HistoryOf(reconcile.Input{Snapshot: p.Snapshot()}, p.owner, reconcile.StatefulSetKind, selector, release)
}

var web = map[string]string{"app": "web"}

// What matches and is nobody's is adopted; what is the owner's and does not match is
// released by who releases; what is another's is left.
func TestHistoryAdoptsAndReleases(t *testing.T) {
	t.Parallel()
	data := mustData(t, historyTemplate("v1"))
	for _, release := range []bool{false, true} {
		p := newPast(t)
		p.revision("ours", 2, data, "owner", web)
		p.revision("orphan", 1, data, "", web)
		p.revision("stranger", 1, data, "", map[string]string{"app": "other"})
		p.revision("theirs", 1, data, "another", web)
		p.revision("strayed", 3, data, "owner", map[string]string{"app": "other"})
		h := p.history(release)
		require.Equal(t, []string{"orphan", "ours"}, h.Names(), "the oldest first")
		want := []string{"patch controllerrevisions default/orphan"}
		if release {
			want = append(want, "patch controllerrevisions default/strayed")
		}
		var got []string
		for _, r := range h.Requests() {
			got = append(got, r.String())
			require.NoError(t, p.Write(context.Background(), r))
		}
		require.ElementsMatch(t, want, got)
		h = p.history(release)
		require.Empty(t, h.Requests(), "once")
		require.Equal(t, []string{"orphan", "ours"}, h.Names())
	}
}

// An owner that is being deleted adopts and releases nothing.
func TestHistoryOfADeletedOwner(t *testing.T) {
	t.Parallel()
	p := newPast(t)
	p.owner.DeletionTimestamp = &metav1.Time{Time: p.Now}
	p.revision("orphan", 1, []byte("{}"), "", web)
	p.revision("strayed", 1, []byte("{}"), "owner", map[string]string{"app": "other"})
	h := p.history(true)
	require.Empty(t, h.Names())
	require.Empty(t, h.Requests())
}

func TestCurrentRevision(t *testing.T) {
	t.Parallel()
	v1, v2 := mustData(t, historyTemplate("v1")), mustData(t, historyTemplate("v2"))
	// As Kubernetes before 1.34 wrote it, with a creationTimestamp of null.
	old := []byte(strings.Replace(string(v2), `"metadata":{`, `"metadata":{"creationTimestamp":null,`, 1))
	require.True(t, json.Valid(old))
	tests := []struct {
		name    string
		past    [][]byte // from the oldest, numbered from 1
		data    []byte
		want    string // the name of the revision
		renamed int64  // the number it is given
	}{
		{name: "none"},
		{name: "others alone", past: [][]byte{v2}, data: v1},
		{name: "the newest", past: [][]byte{v2, v1}, data: v1, want: "rev-2"},
		{name: "an older one is the newest again", past: [][]byte{v1, v2}, data: v1, want: "rev-1", renamed: 3},
		{name: "the newest of two", past: [][]byte{v1, v1, v2}, data: v1, want: "rev-2", renamed: 4},
		{name: "the newest, encoded otherwise", past: [][]byte{v1, old}, data: v2, want: "rev-2"},
		{name: "an older one, encoded otherwise, is another", past: [][]byte{old, v1}, data: v2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newPast(t)
			for i, data := range tt.past {
				p.revision("rev-"+string(rune('1'+i)), int64(i+1), data, "owner", web)
			}
			h := p.history(false)
			rev, renumber := h.Current(tt.data)
			if tt.want == "" {
				require.Nil(t, rev)
				require.Nil(t, renumber)
				return
			}
			require.Equal(t, tt.want, rev.Name)
			if tt.renamed == 0 {
				require.Nil(t, renumber)
				return
			}
			require.Equal(t, tt.renamed, rev.Revision)
			require.NoError(t, p.Write(context.Background(), *renumber))
			h = p.history(false)
			rev, renumber = h.Current(tt.data)
			require.Equal(t, tt.want, rev.Name)
			require.Equal(t, tt.renamed, rev.Revision)
			require.Nil(t, renumber, "once")
		})
	}
}

// A name that other data has is a collision; one that the same data has is used.
func TestProposedRevision(t *testing.T) {
	t.Parallel()
	v1, v2 := mustData(t, historyTemplate("v1")), mustData(t, historyTemplate("v2"))
	p := newPast(t)
	p.revision("web-5", 4, v2, "owner", web)
	p.revision("web-6", 9, v2, "another", nil)
	name := func(collisions int32) string { return "web-" + string(rune('5'+collisions)) }

	h := p.history(false)
	rev, exists, collided := h.Propose(p.Snapshot(), v1, 0, name)
	require.False(t, exists)
	require.Equal(t, "web-7", rev.Name)
	require.EqualValues(t, 2, collided)
	require.EqualValues(t, 5, rev.Revision, "after the newest of its own")
	require.Equal(t, map[string]string{"note": "n"}, rev.Annotations)
	require.True(t, metav1.IsControlledBy(rev, p.owner))
	require.NoError(t, p.Write(context.Background(), reconcile.Create(reconcile.ControllerRevisionsResource, rev)))

	rev, exists, collided = h.Propose(p.Snapshot(), v1, 0, name)
	require.True(t, exists)
	require.Equal(t, "web-7", rev.Name)
	require.EqualValues(t, 2, collided)
}

func TestTruncatedHistory(t *testing.T) {
	t.Parallel()
	p := newPast(t)
	for i, name := range []string{"b", "a", "d", "c"} {
		p.revision(name, int64(i+1), []byte(`{}`), "owner", web)
	}
	h := p.history(false)
	var got []string
	for _, r := range h.Truncate(2, func(rev *appsv1.ControllerRevision) bool { return rev.Name == "a" }) {
		got = append(got, r.String())
	}
	require.Equal(t, []string{"delete controllerrevisions default/b", "delete controllerrevisions default/d"}, got)
	require.Empty(t, h.Truncate(0, func(*appsv1.ControllerRevision) bool { return false }))
}
