package dispatch

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	certificatesv1 "k8s.io/api/certificates/v1"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	pb "timonel/proto/timonel/v1"
)

func certified(p *corev1.Pod) {
	p.Spec.Volumes = []corev1.Volume{{Name: "t", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		Sources: []corev1.VolumeProjection{{PodCertificate: &corev1.PodCertificateProjection{SignerName: "a.b/c"}}}}}}}
}

func certificateRequest(name, uid string) *certificatesv1beta1.PodCertificateRequest {
	return &certificatesv1beta1.PodCertificateRequest{
		TypeMeta:   metav1.TypeMeta{APIVersion: "certificates.k8s.io/v1beta1", Kind: "PodCertificateRequest"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec:       certificatesv1beta1.PodCertificateRequestSpec{SignerName: "a.b/c", PodUID: types.UID(uid)},
	}
}

// TestPodCertificatesOfANode: an agent is sent what it asked for for its pods, and what
// becomes of that, and nothing else.
func TestPodCertificatesOfANode(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	rev := c.put(certificateRequest("req-u1-x", "u1"))
	c.put(certificateRequest("req-u1-forged", "u2")) // says that it is for another pod
	c.put(certificateRequest("req-u11-x", "u11"))    // another pod, whose uid begins alike
	c.put(podOn("a1", "certified", "u1", certified))
	c.put(podOn("a1", "plain", "u11"))
	a := c.connect("c1", &pb.Hello{NodeName: "a1", PodCertificates: true})
	first := a.batch()
	require.Len(t, first, 5, "welcome, one request, two pods, synced: %q", first)
	require.Contains(t, first, fmt.Sprintf("PodCertificateRequest default/req-u1-x rev=%d", rev))

	r := certificateRequest("req-u1-x", "u1")
	r.Status.CertificateChain = "pem"
	rev = c.put(r)
	require.Equal(t, []string{fmt.Sprintf("PodCertificateRequest default/req-u1-x rev=%d", rev), "synced"}, a.batch())
	rev = c.put(certificateRequest("req-u1-y", "u1"))
	require.Equal(t, []string{fmt.Sprintf("PodCertificateRequest default/req-u1-y rev=%d", rev), "synced"}, a.batch())
	c.remove(certificateRequest("req-u1-x", "u1"))
	require.Equal(t, []string{"remove PodCertificateRequest default/req-u1-x", "synced"}, a.batch())
}

// TestPodCertificatesAreForThoseThatKnowThem: an older agent knows no such kind.
func TestPodCertificatesAreForThoseThatKnowThem(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	c.put(certificateRequest("req-u1-x", "u1"))
	c.put(podOn("a1", "certified", "u1", certified))
	first := c.connect("c1", &pb.Hello{NodeName: "a1"}).batch()
	require.Len(t, first, 3, "welcome, pod, synced: %q", first)
}

// TestPodCertificateIsAskedFor: the controller says who has which uid; a request that is
// there already was made by this node before.
func TestPodCertificateIsAskedFor(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	node := nodeObject("a1")
	node.UID = "node-uid"
	c.put(node)
	c.put(&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "sa", UID: "sa-uid"}})
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.batch()
	ask := func(id uint64) *pb.Reply {
		raw, err := (&certificatesv1.PodCertificateRequest{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "req-u1-x"},
			Spec:       certificatesv1.PodCertificateRequestSpec{ServiceAccountName: "sa", PodName: "p", PodUID: "u1", NodeName: "somebody", NodeUID: "else"},
		}).Marshal()
		require.NoError(t, err)
		a.say(&pb.AgentMessage{Message: &pb.AgentMessage_Request{Request: &pb.Request{Id: id, Request: &pb.Request_PodCertificate{
			PodCertificate: &pb.PodCertificate{Request: raw}}}}})
		timeout := time.After(patience)
		for {
			select {
			case m := <-a.got:
				if r := m.GetReply(); r.GetId() == id {
					return r
				}
			case <-timeout:
				t.Fatal("no reply")
			}
		}
	}
	require.Empty(t, ask(1).GetStatus())
	c.api.mu.Lock()
	require.Len(t, c.api.asked, 1)
	spec := c.api.asked[0].Spec
	c.api.mu.Unlock()
	require.Equal(t, "a1 node-uid sa-uid p u1", string(spec.NodeName)+" "+string(spec.NodeUID)+" "+string(spec.ServiceAccountUID)+" "+spec.PodName+" "+string(spec.PodUID))

	c.api.setFail(func(_, _, path string) *apierrors.StatusError {
		require.Equal(t, "/apis/certificates.k8s.io/v1/namespaces/default/podcertificaterequests", path)
		return apierrors.NewAlreadyExists(schema.GroupResource{Resource: "podcertificaterequests"}, "req-u1-x")
	})
	require.Empty(t, ask(2).GetStatus())
	c.api.setFail(func(_, _, _ string) *apierrors.StatusError { return apierrors.NewBadRequest("no") })
	require.NotEmpty(t, ask(3).GetStatus())
}
