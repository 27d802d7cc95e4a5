//go:build !race

package apitest

import (
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/state/objects"
)

// What Secrets of type kubernetes.io/service-account-token get is accepted by the API
// server, which notes the day of their use, until it is marked invalid; they go with
// their ServiceAccount.
func TestServiceAccountTokenSecrets(t *testing.T) {
	c := start(t)
	account, err := c.client.CoreV1().ServiceAccounts("default").Create(c.ctx(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "robot"}}, metav1.CreateOptions{})
	c.must(err)
	for name, labels := range map[string]map[string]string{"good": nil, "invalid": {"kubernetes.io/legacy-token-invalid-since": "2026-01-01"}} {
		_, err := c.client.CoreV1().Secrets("default").Create(c.ctx(), &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels, Annotations: map[string]string{corev1.ServiceAccountNameKey: "robot"}},
			Type:       corev1.SecretTypeServiceAccountToken,
		}, metav1.CreateOptions{})
		c.must(err)
	}
	tokens := map[string]string{}
	c.await("tokens", func(s *objects.Snapshot) bool {
		for _, name := range []string{"good", "invalid"} {
			secret, ok := s.Secrets().Get("default", name)
			if !ok || string(secret.Data["ca.crt"]) != "the CA" || string(secret.Data["namespace"]) != "default" || secret.Annotations[corev1.ServiceAccountUIDKey] != string(account.UID) {
				return false
			}
			tokens[name] = string(secret.Data["token"])
		}
		return tokens["good"] != "" && tokens["invalid"] != ""
	})
	review := func(token string) authenticationv1.TokenReviewStatus {
		t.Helper()
		r, err := c.client.AuthenticationV1().TokenReviews().Create(c.ctx(), &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}, metav1.CreateOptions{})
		c.must(err)
		return r.Status
	}
	got := review(tokens["good"])
	// What the API server knows of Secrets, by an informer, may be a moment behind.
	for end := time.Now().Add(20 * time.Second); !got.Authenticated && time.Now().Before(end); got = review(tokens["good"]) {
		time.Sleep(10 * time.Millisecond)
	}
	if !got.Authenticated || got.User.Username != "system:serviceaccount:default:robot" || got.User.UID != string(account.UID) {
		t.Errorf("a token from a Secret: %+v", got)
	}
	if got := review(tokens["invalid"]); got.Authenticated {
		t.Errorf("a token that is marked invalid: %+v", got)
	}
	c.await("the day of the last use", func(s *objects.Snapshot) bool {
		secret, ok := s.Secrets().Get("default", "good")
		return ok && secret.Labels["kubernetes.io/legacy-token-last-used"] != ""
	})
	c.must(c.client.CoreV1().ServiceAccounts("default").Delete(c.ctx(), "robot", metav1.DeleteOptions{}))
	c.await("no tokens without their account", func(s *objects.Snapshot) bool {
		_, good := s.Secrets().Get("default", "good")
		_, invalid := s.Secrets().Get("default", "invalid")
		return !good && !invalid
	})
}
