package volume

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
)

// A token is asked for with the audience and the life that its volume names.
func TestTokenIsAskedForAsTheVolumeSays(t *testing.T) {
	t.Parallel()
	var asked authenticationv1.TokenRequestSpec
	m := New(Config{
		Dir: t.TempDir(), Objects: &fakeObjects{}, Now: time.Now, Logger: slog.New(slog.DiscardHandler),
		Tokens: func(_ context.Context, _, _ string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
			asked = tr.Spec
			return &authenticationv1.TokenRequest{Status: authenticationv1.TokenRequestStatus{Token: "t", ExpirationTimestamp: metav1.NewTime(time.Now().Add(time.Hour))}}, nil
		},
	})
	pod := newPod(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
		{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token", Audience: "vault", ExpirationSeconds: ptr.To[int64](1234)}},
	}}}})
	t.Cleanup(func() { require.NoError(t, m.Teardown(context.Background(), pod.UID)) })
	_, _, err := m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	require.Equal(t, []string{"vault"}, asked.Audiences)
	require.EqualValues(t, 1234, *asked.ExpirationSeconds)
}
