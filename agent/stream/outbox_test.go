package stream

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	pb "timonel/proto/timonel/v1"
)

// A status that no controller takes would end the stream of all other pods, each
// time that it is sent again.
func TestAStatusThatNoControllerTakesIsNotSent(t *testing.T) {
	t.Parallel()
	out := newOutbox()
	pod := func(uid types.UID) *corev1.Pod { return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: uid}} }
	require.NoError(t, out.setStatus(pod("a"), &corev1.PodStatus{Message: "was"}))
	require.ErrorContains(t, out.setStatus(pod("a"), &corev1.PodStatus{Message: strings.Repeat("x", pb.MaxStatus+1)}), "controllers take")
	require.NoError(t, out.setStatus(pod("b"), &corev1.PodStatus{Message: strings.Repeat("x", pb.MaxStatus/2)}))
	sent := map[string]int{}
	for _, m := range out.take() {
		sent[m.GetPodStatus().GetUid()] = len(m.GetPodStatus().GetStatus())
	}
	require.Len(t, sent, 2)
	require.Less(t, sent["a"], 100, "the one before")
	require.Greater(t, sent["b"], pb.MaxStatus/2)
}
