package policy

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"

	corev1 "k8s.io/api/core/v1"
)

// legacyIssuer is who tokens in Secrets are said to be from, in Kubernetes too.
const legacyIssuer = "kubernetes/serviceaccount"

// TokenSigner makes the tokens of ServiceAccounts that are kept in Secrets. The
// same claims and the same key make the same token, so a reconciler that signs
// is still a function of its input.
type TokenSigner struct {
	key       crypto.Signer
	hash      crypto.Hash
	size      int    // of each half of an elliptic signature; 0 with an RSA key
	algorithm string // as JSON Web Algorithms names it
	keyID     string
}

// NewTokenSigner returns a signer with the cluster's service account key, an RSA
// key or one on the curves P-256, P-384 or P-521.
func NewTokenSigner(key crypto.Signer) (*TokenSigner, error) {
	s := &TokenSigner{key: key}
	switch public := key.Public().(type) {
	case *rsa.PublicKey:
		s.algorithm, s.hash = "RS256", crypto.SHA256
	case *ecdsa.PublicKey:
		switch public.Curve {
		case elliptic.P256():
			s.algorithm, s.hash, s.size = "ES256", crypto.SHA256, 32
		case elliptic.P384():
			s.algorithm, s.hash, s.size = "ES384", crypto.SHA384, 48
		case elliptic.P521():
			s.algorithm, s.hash, s.size = "ES512", crypto.SHA512, 66
		default:
			return nil, fmt.Errorf("the service account key is on curve %s: use P-256, P-384, P-521 or RSA", public.Params().Name)
		}
	default:
		return nil, fmt.Errorf("the service account key is a %T: use an RSA or an elliptic key", public)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("encode the service account key's public part: %w", err)
	}
	// The API server finds the key by this name.
	sum := sha256.Sum256(der)
	s.keyID = base64.RawURLEncoding.EncodeToString(sum[:])
	return s, nil
}

// Token returns the token that a Secret holds for its ServiceAccount. It has no
// end: it is valid as long as the Secret is there.
func (s *TokenSigner) Token(account *corev1.ServiceAccount, secret *corev1.Secret) (string, error) {
	header, err := json.Marshal(map[string]string{"alg": s.algorithm, "kid": s.keyID})
	if err != nil {
		return "", err
	}
	claims, err := json.Marshal(map[string]string{
		"iss":                                    legacyIssuer,
		"sub":                                    "system:serviceaccount:" + account.Namespace + ":" + account.Name,
		"kubernetes.io/serviceaccount/namespace": account.Namespace,
		"kubernetes.io/serviceaccount/secret.name":          secret.Name,
		"kubernetes.io/serviceaccount/service-account.name": account.Name,
		"kubernetes.io/serviceaccount/service-account.uid":  string(account.UID),
	})
	if err != nil {
		return "", err
	}
	signed := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(claims)
	signature, err := s.sign([]byte(signed))
	if err != nil {
		return "", fmt.Errorf("sign the token of service account %s/%s: %w", account.Namespace, account.Name, err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}

// sign signs without randomness: PKCS #1 v1.5 has none, and elliptic keys take it
// from the message when they are given none (RFC 6979).
func (s *TokenSigner) sign(message []byte) ([]byte, error) {
	h := s.hash.New()
	h.Write(message)
	signature, err := s.key.Sign(nil, h.Sum(nil), s.hash)
	if err != nil || s.size == 0 {
		return signature, err
	}
	// A JSON Web Signature has both numbers at full length, not in ASN.1.
	var pair struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(signature, &pair); err != nil || len(rest) > 0 {
		return nil, fmt.Errorf("the key made no ASN.1 signature: %w", err)
	}
	out := make([]byte, 2*s.size)
	pair.R.FillBytes(out[:s.size])
	pair.S.FillBytes(out[s.size:])
	return out, nil
}
