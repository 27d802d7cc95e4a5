package policy_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile/policy"
)

// The token is the one that Kubernetes makes, verifies with the public key, and is
// the same each time.
func TestToken(t *testing.T) {
	t.Parallel()
	curve := func(c elliptic.Curve) crypto.Signer {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "robot", UID: "u1"}}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "robot-token"}}
	for name, c := range map[string]struct {
		key       crypto.Signer
		algorithm string
		hash      crypto.Hash
	}{
		"P-256": {curve(elliptic.P256()), "ES256", crypto.SHA256},
		"P-384": {curve(elliptic.P384()), "ES384", crypto.SHA384},
		"P-521": {curve(elliptic.P521()), "ES512", crypto.SHA512},
		"RSA":   {rsaKey, "RS256", crypto.SHA256},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			signer, err := policy.NewTokenSigner(c.key)
			if err != nil {
				t.Fatal(err)
			}
			token, err := signer.Token(account, secret)
			if err != nil {
				t.Fatal(err)
			}
			if again, err := signer.Token(account, secret); err != nil || again != token {
				t.Errorf("the second token is another one: %v", err)
			}
			parts := strings.Split(token, ".")
			if len(parts) != 3 {
				t.Fatalf("%d parts, not 3: %s", len(parts), token)
			}
			decode := func(part string) []byte {
				out, err := base64.RawURLEncoding.DecodeString(part)
				if err != nil {
					t.Fatal(err)
				}
				return out
			}
			var header map[string]string
			var claims map[string]any
			if err := json.Unmarshal(decode(parts[0]), &header); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(decode(parts[1]), &claims); err != nil {
				t.Fatal(err)
			}
			if header["alg"] != c.algorithm || header["kid"] == "" {
				t.Errorf("header %v", header)
			}
			for claim, want := range map[string]string{
				"iss": "kubernetes/serviceaccount", "sub": "system:serviceaccount:ns:robot",
				"kubernetes.io/serviceaccount/namespace":            "ns",
				"kubernetes.io/serviceaccount/secret.name":          "robot-token",
				"kubernetes.io/serviceaccount/service-account.name": "robot",
				"kubernetes.io/serviceaccount/service-account.uid":  "u1",
			} {
				if claims[claim] != want {
					t.Errorf("claim %s is %v, not %s", claim, claims[claim], want)
				}
				delete(claims, claim)
			}
			if len(claims) > 0 {
				t.Errorf("other claims: %v", claims)
			}
			h := c.hash.New()
			h.Write([]byte(parts[0] + "." + parts[1]))
			digest, signature := h.Sum(nil), decode(parts[2])
			valid := false
			switch public := c.key.Public().(type) {
			case *rsa.PublicKey:
				valid = rsa.VerifyPKCS1v15(public, c.hash, digest, signature) == nil
			case *ecdsa.PublicKey:
				half := (public.Curve.Params().BitSize + 7) / 8
				valid = len(signature) == 2*half &&
					ecdsa.Verify(public, digest, new(big.Int).SetBytes(signature[:half]), new(big.Int).SetBytes(signature[half:]))
			}
			if !valid {
				t.Error("the signature is not the key's")
			}
		})
	}
}

func TestTokenSignerRefuses(t *testing.T) {
	t.Parallel()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := policy.NewTokenSigner(key); err == nil || !strings.Contains(err.Error(), "RSA or an elliptic key") {
		t.Errorf("an Ed25519 key, which the API server does not know: %v", err)
	}
}
