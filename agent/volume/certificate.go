package volume

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"strings"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	pb "timonel/proto/timonel/v1"
)

const (
	// askedPatience is after what time a request that is not there was deleted by
	// somebody, as upstream assumes it.
	askedPatience = 10 * time.Minute
	// overdueAfter is when a certificate that should have been renewed is overdue.
	overdueAfter = 10 * time.Minute
	// spreadRenewal is over how long renewals are spread that would fall together.
	spreadRenewal = 5 * time.Minute
	// lookAgain is when to look for what is due while a request is open.
	lookAgain = time.Minute
)

// errNotIssued is upstream's word for a certificate that is on its way.
var errNotIssued = errors.New("credential bundle is not issued yet")

// Certificates has a PodCertificateRequest made, unless there is one of that name.
type Certificates func(ctx context.Context, r *certificatesv1.PodCertificateRequest) error

// credential is what there is of one podCertificate source: key and certificates, what
// was asked for last, or why there never will be any.
type credential struct {
	Key       []byte    `json:"key,omitempty"` // PEM, as Chain
	Chain     []byte    `json:"chain,omitempty"`
	RefreshAt time.Time `json:"refreshAt"`
	NotAfter  time.Time `json:"notAfter"`
	// Overdue and Expired were told.
	Overdue bool   `json:"overdue,omitempty"`
	Expired bool   `json:"expired,omitempty"`
	Asked   *asked `json:"asked,omitempty"`
	Refused string `json:"refused,omitempty"`
}

// asked is a request of this node.
type asked struct {
	Name    string    `json:"name"`
	Key     []byte    `json:"key"`     // PEM
	Request []byte    `json:"request"` // PKCS#10
	Until   time.Time `json:"until"`   // it is there, or was deleted
	Made    bool      `json:"made,omitempty"`
}

// told is what a pod's owner should hear.
type told struct{ reason, message string }

// hear takes what became of a request, nil for one that is not there, and the time. spread
// puts a renewal off, so that many do not come at once.
func (c *credential) hear(pcr *certificatesv1.PodCertificateRequest, now time.Time, spread time.Duration) []told {
	var out []told
	switch a := c.Asked; {
	case a == nil || c.Refused != "":
	case pcr == nil:
		if a.Made && now.After(a.Until) {
			c.Asked = nil
		}
	case !bytes.Equal(pcr.Spec.StubPKCS10Request, a.Request):
		c.Asked = nil // somebody else's, by our name
	default:
		a.Made = true
		out = c.settle(pcr, spread)
	}
	if c.Chain == nil || c.Refused != "" {
		return out
	}
	if now.After(c.RefreshAt.Add(overdueAfter)) && !c.Overdue {
		c.Overdue = true
		out = append(out, told{"CertificateOverdueForRefresh", "PodCertificate refresh overdue"})
	}
	if now.After(c.NotAfter) && !c.Expired {
		c.Expired = true
		out = append(out, told{"CertificateExpired", "PodCertificate expired"})
	}
	return out
}

// settle takes a request's end, if it has come to one.
func (c *credential) settle(pcr *certificatesv1.PodCertificateRequest, spread time.Duration) []told {
	name := pcr.Namespace + "/" + pcr.Name
	for _, cond := range pcr.Status.Conditions {
		switch cond.Type {
		case certificatesv1.PodCertificateRequestConditionTypeDenied:
			c.Asked, c.Refused = nil, fmt.Sprintf("PodCertificateRequest was permanently denied: reason=%q message=%q", cond.Reason, cond.Message)
			return []told{{cond.Type, fmt.Sprintf("PodCertificateRequest %s was denied, reason=%q, message=%q", name, cond.Reason, cond.Message)}}
		case certificatesv1.PodCertificateRequestConditionTypeFailed:
			c.Asked, c.Refused = nil, fmt.Sprintf("PodCertificateRequest was permanently failed: reason=%q message=%q", cond.Reason, cond.Message)
			return []told{{cond.Type, fmt.Sprintf("PodCertificateRequest %s failed, reason=%q, message=%q", name, cond.Reason, cond.Message)}}
		case certificatesv1.PodCertificateRequestConditionTypeIssued:
			if pcr.Status.BeginRefreshAt == nil || pcr.Status.NotAfter == nil {
				return nil // validation does not let it be
			}
			*c = credential{
				Key: c.Asked.Key, Chain: onlyCertificates(pcr.Status.CertificateChain),
				RefreshAt: pcr.Status.BeginRefreshAt.Add(spread), NotAfter: pcr.Status.NotAfter.Time,
			}
			return nil
		}
	}
	return nil
}

// due says whether a certificate should be asked for.
func (c *credential) due(now time.Time) bool {
	return c.Refused == "" && c.Asked == nil && (c.Chain == nil || !now.Before(c.RefreshAt))
}

// certificate adds the key and the certificates of a podCertificate source, or asks for
// them. The key is nowhere but on tmpfs, and here while it is made.
func (p *payload) certificate(src *corev1.PodCertificateProjection, index int, mode int32) error {
	m, now := p.manager, p.manager.cfg.Now()
	records, err := p.certificateRecords()
	if err != nil {
		return err
	}
	defer records.Close()
	record := recordName(p.volume, fmt.Sprint(index))
	var c credential
	readRecord(records, record, &c)
	var pcr *certificatesv1.PodCertificateRequest
	if c.Asked != nil {
		pcr, _ = m.cfg.PodCertificateRequest(p.pod.Namespace, c.Asked.Name)
	}
	before := c
	news := c.hear(pcr, now, time.Duration(mathrand.Int64N(int64(spreadRenewal))))
	if len(news) > 0 || c.Asked != before.Asked {
		if err := writeRecord(records, record, &c); err != nil {
			return err
		}
	}
	for _, n := range news {
		m.cfg.Event(p.pod.UID, corev1.EventTypeWarning, n.reason, n.message)
	}
	if c.Refused != "" {
		return errors.New(c.Refused)
	}
	if err := p.ctx.Err(); err != nil { // there may be thousands, and keys take time
		return err
	}
	if c.due(now) {
		key, request, err := newKey(src.KeyType)
		if err != nil {
			return fmt.Errorf("podCertificate of signer %q: %w", src.SignerName, err)
		}
		c.Asked = &asked{
			Name: pb.PodCertificatePrefix(p.pod.UID) + strings.ToLower(rand.Text()[:10]), Key: key, Request: request,
			Until: now.Add(askedPatience + time.Duration(mathrand.Int64N(int64(spreadRenewal)))),
		}
		if err := writeRecord(records, record, &c); err != nil {
			return err
		}
	}
	if c.Asked != nil && !c.Asked.Made {
		err := m.cfg.Certificates(p.ctx, p.certificateRequest(src, c.Asked))
		if err == nil {
			c.Asked.Made = true
			err = writeRecord(records, record, &c)
		}
		if err != nil && c.Chain == nil {
			return fmt.Errorf("ask signer %q for a certificate: %w", src.SignerName, err)
		}
		if err != nil {
			m.cfg.Logger.Warn("cannot ask for a new certificate; the old one stays", "pod", p.pod.Namespace+"/"+p.pod.Name,
				"signer", src.SignerName, "expires", c.NotAfter, "error", err)
		}
	}
	if c.Chain == nil {
		return errNotIssued
	}
	if c.Asked != nil {
		p.renew(now.Add(lookAgain))
	} else {
		p.renew(c.RefreshAt)
	}
	return p.addCredential(src, &c, mode)
}

func (p *payload) addCredential(src *corev1.PodCertificateProjection, c *credential, mode int32) error {
	for _, f := range []struct {
		path string
		data [][]byte
	}{
		{src.CredentialBundlePath, [][]byte{c.Key, c.Chain}},
		{src.KeyPath, [][]byte{c.Key}},
		{src.CertificateChainPath, [][]byte{c.Chain}},
	} {
		if f.path == "" {
			continue
		}
		e := p.private(mode)
		e.data = bytes.Join(f.data, nil)
		if err := p.add(f.path, e); err != nil {
			return err
		}
	}
	return nil
}

// certificateRequest is what is asked of the API. The controller knows who has which uid.
func (p *payload) certificateRequest(src *corev1.PodCertificateProjection, a *asked) *certificatesv1.PodCertificateRequest {
	return &certificatesv1.PodCertificateRequest{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.pod.Namespace, Name: a.Name,
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: p.pod.Name, UID: p.pod.UID}},
		},
		Spec: certificatesv1.PodCertificateRequestSpec{
			SignerName: src.SignerName, PodName: p.pod.Name, PodUID: p.pod.UID, ServiceAccountName: p.pod.Spec.ServiceAccountName,
			NodeName: types.NodeName(p.manager.cfg.Node), MaxExpirationSeconds: src.MaxExpirationSeconds,
			StubPKCS10Request: a.Request, UnverifiedUserAnnotations: src.UserAnnotations,
		},
	}
}

// AskedFor says whether a PodCertificateRequest of that name is one that this node makes
// for a pod.
func AskedFor(pod *corev1.Pod, name string) bool {
	return strings.HasPrefix(name, pb.PodCertificatePrefix(pod.UID))
}

// newKey makes a key and what proves that its maker has it.
func newKey(keyType string) (key, request []byte, err error) {
	var private crypto.Signer
	switch keyType {
	case "RSA3072":
		private, err = rsa.GenerateKey(rand.Reader, 3072)
	case "RSA4096":
		private, err = rsa.GenerateKey(rand.Reader, 4096)
	case "ECDSAP256":
		private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ECDSAP384":
		private, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "ECDSAP521":
		private, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case "ED25519":
		_, private, err = ed25519.GenerateKey(rand.Reader)
	default:
		return nil, nil, fmt.Errorf("unknown key type %q", keyType)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("make a key of type %s: %w", keyType, err)
	}
	if request, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, private); err != nil {
		return nil, nil, fmt.Errorf("make a PKCS#10 request: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, fmt.Errorf("encode a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), request, nil
}

// onlyCertificates is a chain without what a signer wrote between and before its blocks.
func onlyCertificates(chain string) []byte {
	out := []byte{}
	for rest := []byte(chain); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return out
		}
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes})...)
	}
}
