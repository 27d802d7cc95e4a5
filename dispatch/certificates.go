package dispatch

import (
	"context"
	"fmt"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	certificatesclient "k8s.io/client-go/kubernetes/typed/certificates/v1"

	pb "timonel/proto/timonel/v1"
	"timonel/state/objects"
)

// requestCertificate makes a PodCertificateRequest as this node. One of that name is the
// same one: an agent asks again when it does not know what came of it.
func (s *session) requestCertificate(ctx context.Context, q *pb.PodCertificate) error {
	in := &certificatesv1.PodCertificateRequest{}
	if err := in.Unmarshal(q.GetRequest()); err != nil {
		return apierrors.NewBadRequest("decode PodCertificateRequest: " + err.Error())
	}
	snapshot := s.d.config.Objects.Snapshot()
	in.Spec.NodeName, in.Spec.NodeUID = types.NodeName(s.node), ""
	if node, ok := snapshot.Nodes().Get("", s.node); ok {
		in.Spec.NodeUID = node.UID
	}
	if account, ok := snapshot.ServiceAccounts().Get(in.Namespace, in.Spec.ServiceAccountName); ok {
		in.Spec.ServiceAccountUID = account.UID
	}
	client, err := certificatesclient.NewForConfig(s.d.config.API(s.node))
	if err != nil {
		return fmt.Errorf("API client of node %s: %w", s.node, err)
	}
	_, err = client.PodCertificateRequests(in.Namespace).Create(ctx, in, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// podCertificates calls add with the PodCertificateRequests for a pod.
func podCertificates(pod *corev1.Pod, s *objects.Snapshot, add func(objKey)) {
	add(objKey{kindCertified, pod.Namespace, string(pod.UID)})
	for r := range s.PodCertificateRequests().Named(pod.Namespace, pb.PodCertificatePrefix(pod.UID)) {
		if r.Spec.PodUID == pod.UID {
			addNamed(add, kindPodCertificate, r.Namespace, r.Name)
		}
	}
}
