package dispatch

import (
	"crypto/sha256"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	pb "timonel/proto/timonel/v1"
	"timonel/state"
	"timonel/state/objects"
)

func digest16(raw []byte) []byte {
	sum := sha256.Sum256(raw)
	return sum[:16]
}

// take notes what a message makes the agent have.
func (a *agent) take(m *pb.ControllerMessage) {
	switch m := m.GetMessage().(type) {
	case *pb.ControllerMessage_PodSet:
		pod := &corev1.Pod{}
		require.NoError(a.t, pod.Unmarshal(m.PodSet.Pod))
		a.pods[string(pod.UID)] = &pb.HavePod{
			Namespace: pod.Namespace, Name: pod.Name, Uid: string(pod.UID), Revision: objects.Revision(pod), Digest: digest16(m.PodSet.Pod),
		}
	case *pb.ControllerMessage_PodRemove:
		delete(a.pods, m.PodRemove.Uid)
	case *pb.ControllerMessage_ObjectSet:
		o := map[string]interface {
			metav1.Object
			Unmarshal([]byte) error
		}{kindConfigMap: &corev1.ConfigMap{}, kindSecret: &corev1.Secret{}, kindServiceAccount: &corev1.ServiceAccount{},
			kindClaim: &corev1.PersistentVolumeClaim{}, kindVolume: &corev1.PersistentVolume{}, kindTrustBundle: &certificatesv1.ClusterTrustBundle{},
			kindPodCertificate: &certificatesv1.PodCertificateRequest{}, kindRuntimeClass: &nodev1.RuntimeClass{}, kindDriver: &storagev1.CSIDriver{}, kindAttachment: &storagev1.VolumeAttachment{}}[m.ObjectSet.Kind]
		require.NoError(a.t, o.Unmarshal(m.ObjectSet.Object))
		a.objs[m.ObjectSet.Kind+"/"+o.GetName()] = &pb.HaveObject{
			Kind: m.ObjectSet.Kind, Namespace: o.GetNamespace(), Name: o.GetName(), Uid: string(o.GetUID()),
			Revision: objects.Revision(o), Digest: digest16(m.ObjectSet.Object),
		}
	case *pb.ControllerMessage_ObjectRemove:
		delete(a.objs, m.ObjectRemove.Kind+"/"+m.ObjectRemove.Name)
	}
}

// have is the list that the agent sends when it comes again.
func (a *agent) have() *pb.Have {
	h := &pb.Have{Revision: a.synced}
	for _, p := range a.pods {
		h.Pods = append(h.Pods, p)
	}
	for _, o := range a.objs {
		h.Objects = append(h.Objects, o)
	}
	return proto.Clone(h).(*pb.Have)
}

// TestComesBack has an agent come back, after things happened while it was away,
// to each kind of controller: whatever that one remembers, the node gets the
// difference.
func TestComesBack(t *testing.T) {
	t.Parallel()
	web := func(uid string, change ...func(*corev1.Pod)) *corev1.Pod { return podOn("a1", "web", uid, change...) }
	happened := []struct {
		name string
		do   func(c *cluster)
		want []string // beside Welcome and Synced; N is the revision of the last write
	}{
		{"nothing", func(*cluster) {}, nil},
		{"a pod was deleted", func(c *cluster) { c.remove(web("u1")) },
			[]string{"remove pod default/web uid=u1", "remove ConfigMap default/env", "remove Secret default/key"}},
		{"a pod was deleted and one came and went", func(c *cluster) {
			c.put(podOn("a1", "short", "u9"))
			c.remove(web("u1"))
			c.remove(podOn("a1", "short", "u9"))
		}, []string{"remove pod default/web uid=u1", "remove ConfigMap default/env", "remove Secret default/key"}},
		{"a pod was replaced by one of its name", func(c *cluster) { c.remove(web("u1")); c.put(web("u2", withRefs)) },
			[]string{"remove pod default/web uid=u1", "pod default/web uid=u2 rev=N resume=0"}},
		{"a pod moved to another node under its name", func(c *cluster) { c.remove(web("u1")); c.put(podOn("a2", "web", "u2")) },
			[]string{"remove pod default/web uid=u1", "remove ConfigMap default/env", "remove Secret default/key"}},
		{"a pod changed", func(c *cluster) {
			c.put(web("u1", withRefs, func(p *corev1.Pod) { p.Labels = map[string]string{"v": "2"} }))
		},
			[]string{"pod default/web uid=u1 rev=N resume=0"}},
		{"a pod was asked to end", func(c *cluster) {
			now := metav1.Now()
			c.put(web("u1", withRefs, func(p *corev1.Pod) { p.DeletionTimestamp = &now }))
		}, []string{"pod default/web uid=u1 rev=N resume=0"}},
		{"a pod was bound", func(c *cluster) { c.put(podOn("a1", "new", "u5")) }, []string{"pod default/new uid=u5 rev=N resume=0"}},
		{"a secret was deleted", func(c *cluster) { c.remove(secret("key", "1")) }, []string{"remove Secret default/key"}},
		{"a config map was deleted and its pod too", func(c *cluster) { c.remove(configMap("env", "1")); c.remove(web("u1")) },
			[]string{"remove pod default/web uid=u1", "remove ConfigMap default/env", "remove Secret default/key"}},
		{"a config map changed", func(c *cluster) { c.put(configMap("env", "2")) }, []string{"ConfigMap default/env rev=N"}},
		{"a pod does not use its config map any more", func(c *cluster) {
			c.put(web("u1", withRefs, func(p *corev1.Pod) { p.Spec.Containers[0].EnvFrom = nil }))
		}, []string{"pod default/web uid=u1 rev=N resume=0", "remove ConfigMap default/env"}},
		{"an unrelated object changed", func(c *cluster) { c.put(configMap("unrelated", "2")) }, nil},
	}
	controllers := []struct {
		name string
		next func(c *cluster) string // the controller that the agent comes to
	}{
		{"the same", func(c *cluster) string { return "c1" }},
		{"another", func(c *cluster) string { return "c2" }},
		{"restarted", func(c *cluster) string { c.controllers["c1"].stop(); c.start("c1"); return "c1" }},
		{"restored from a snapshot", func(c *cluster) string {
			r, w := io.Pipe()
			go func() { w.CloseWithError(c.store.Save(w)) }()
			restored := state.New(state.Options{})
			require.NoError(c.t, restored.Restore(r))
			c.controllers["c1"].stop()
			c.controllers["c2"].stop()
			c.mu.Lock()
			c.store = restored
			c.mu.Unlock()
			c.start("c3")
			return "c3"
		}},
	}
	for _, k := range controllers {
		for _, h := range happened {
			t.Run(k.name+"/"+h.name, func(t *testing.T) {
				t.Parallel()
				c := newCluster(t, "c1", "c2")
				c.put(nodeObject("a1"))
				for _, o := range []runtime.Object{configMap("env", "1"), configMap("unrelated", "1"), secret("key", "1"), podOn("a2", "elsewhere", "u0"), web("u1", withRefs), podOn("a1", "same", "u3")} {
					c.put(o)
				}
				a := c.connect("c1", &pb.Hello{NodeName: "a1"})
				a.batch()
				a.cancel()
				require.Error(t, a.end())
				h.do(c)
				last := c.store.View().Revision()
				b := c.connect(k.next(c), &pb.Hello{NodeName: "a1", Epoch: c.bundle.ClusterID(), Have: a.have()})
				got := b.batch()
				require.True(t, strings.HasSuffix(got[0], "full=false"), got[0])
				require.Equal(t, "synced", got[len(got)-1])
				var want []string
				for _, line := range h.want {
					want = append(want, strings.ReplaceAll(line, "=N", fmt.Sprint("=", last)))
				}
				require.ElementsMatch(t, want, got[1:len(got)-1])
			})
		}
	}
}

// TestListsAreNotTrusted sends lists that are wrong, of a state that was lost, or
// made up.
func TestListsAreNotTrusted(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	c.put(configMap("env", "1"))
	c.put(secret("hidden", "1")) // no pod of a1 uses it
	other := c.put(podOn("a2", "other", "u0"))
	rev := c.put(podOn("a1", "web", "u1", func(p *corev1.Pod) {
		p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "env"}}}}
	}))
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.batch()
	epoch := c.bundle.ClusterID()
	webAgain := fmt.Sprintf("pod default/web uid=u1 rev=%d resume=0", rev)
	for _, tc := range []struct {
		name   string
		change func(h *pb.Have)
		want   []string
	}{
		{"a pod's content is of a lost state", func(h *pb.Have) { h.Pods[0].Digest = digest16([]byte("x")) }, []string{webAgain}},
		{"no digest", func(h *pb.Have) { h.Pods[0].Digest = nil }, []string{webAgain}},
		{"a pod's revision is of the future", func(h *pb.Have) { h.Pods[0].Revision += 1000; h.Revision += 1000 }, []string{webAgain}},
		{"an object's content is of a lost state", func(h *pb.Have) { h.Objects[0].Digest = nil }, []string{"ConfigMap default/env rev=3"}},
		{"an object was made again under its name", func(h *pb.Have) { h.Objects[0].Uid = "another" }, []string{"ConfigMap default/env rev=3"}},
		{"two pods of one name", func(h *pb.Have) {
			h.Pods = append(h.Pods, &pb.HavePod{Namespace: "default", Name: "web", Uid: "u0", Revision: rev})
		}, []string{"remove pod default/web uid=u0"}},
		{"another node's pod", func(h *pb.Have) {
			h.Pods = append(h.Pods, &pb.HavePod{Namespace: "default", Name: "other", Uid: "u0", Revision: other})
		}, []string{"remove pod default/other uid=u0"}},
		{"objects that are not its own", func(h *pb.Have) {
			h.Objects = append(h.Objects, &pb.HaveObject{Kind: kindSecret, Namespace: "default", Name: "hidden", Revision: 4},
				&pb.HaveObject{Kind: kindSecret, Namespace: "default", Name: "no such", Revision: 4}, &pb.HaveObject{Kind: "Widget", Namespace: "", Name: ""})
		}, []string{"remove Secret default/hidden", "remove Secret default/no such", "remove Widget /"}},
		{"nothing", func(h *pb.Have) { h.Pods, h.Objects = nil, nil }, []string{"ConfigMap default/env rev=3", webAgain}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			have := a.have()
			tc.change(have)
			got := c.connect("c1", &pb.Hello{NodeName: "a1", Epoch: epoch, Have: have}).batch()
			require.Equal(t, "welcome from c1 full=false", got[0])
			require.ElementsMatch(t, tc.want, got[1:len(got)-1])
		})
	}

	long := a.have()
	for range 9 {
		long.Objects = append(long.Objects, &pb.HaveObject{Kind: kindSecret, Name: strings.Repeat("x", 512<<10)})
	}
	many := a.have()
	for i := range pb.MaxHavePods {
		many.Pods = append(many.Pods, &pb.HavePod{Namespace: "default", Name: fmt.Sprint(i), Uid: fmt.Sprint(i)})
	}
	for name, hello := range map[string]*pb.Hello{
		"another cluster":               {NodeName: "a1", Epoch: "another", Have: a.have()},
		"an agent that knows no lists":  {NodeName: "a1", Epoch: epoch, ResumeRevision: a.synced},
		"one that begins":               {NodeName: "a1"},
		"a list that is too long":       {NodeName: "a1", Epoch: epoch, Have: long},
		"a list that has too many pods": {NodeName: "a1", Epoch: epoch, Have: many},
	} {
		t.Run(name, func(t *testing.T) {
			got := c.connect("c1", hello).batch()
			require.Equal(t, []string{"welcome from c1 full=true", "ConfigMap default/env rev=3", webAgain, "synced"}, got)
		})
	}
}
