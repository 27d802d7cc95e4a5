package pki

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// tokenPrefix names the token's form, so that it can change.
const tokenPrefix = "timonel1"

// Token is what an agent joins with.
type Token struct {
	CAHash string // sha256 of the cluster's CA certificate (DER), 64 hexadecimal digits
	Secret string // proves to the cluster that the agent may join
}

// String is the token's text form.
func (t Token) String() string { return tokenPrefix + "." + t.CAHash + "." + t.Secret }

// ParseToken reads a token's text form. White space around it is ignored. The
// error does not repeat the token.
func ParseToken(text string) (Token, error) {
	text = strings.TrimSpace(text)
	if text == "" {
		return Token{}, errors.New("the join token is empty")
	}
	parts := strings.Split(text, ".")
	if len(parts) != 3 || parts[0] != tokenPrefix {
		return Token{}, fmt.Errorf("the join token is not of the form %s.<64 hexadecimal digits>.<secret>: copy all of it", tokenPrefix)
	}
	t := Token{CAHash: strings.ToLower(parts[1]), Secret: parts[2]}
	if raw, err := hex.DecodeString(t.CAHash); err != nil || len(raw) != sha256.Size {
		return Token{}, fmt.Errorf("the join token's second part is not 64 hexadecimal digits but %d characters: copy all of it", len(parts[1]))
	}
	if t.Secret == "" {
		return Token{}, errors.New("the join token's secret is missing: copy all of it")
	}
	return t, nil
}

// VerifyCA checks that a CA certificate (PEM) is the one that the token names.
func (t Token) VerifyCA(caPEM []byte) error {
	cert, err := parseCert(caPEM)
	if err != nil {
		return fmt.Errorf("the cluster's CA: %w", err)
	}
	if got := hashCA(cert); got != t.CAHash {
		return fmt.Errorf("the CA %s does not match the token, which is of the cluster with CA %s", short(got), short(t.CAHash))
	}
	return nil
}

func hashCA(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// short is a hash as people compare it.
func short(hash string) string { return "sha256:" + hash[:min(12, len(hash))] + "…" }
