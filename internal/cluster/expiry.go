package cluster

import (
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	timonelv1 "timonel/proto/timonel/v1"
)

// Expiry is when something that the cluster's trust rests on ends.
type Expiry struct {
	What string    `json:"what"`
	Kind string    `json:"kind"` // authority, controller, node, token, kubeconfig
	At   time.Time `json:"at"`
}

// warnings says of each kind how long before its end that is a problem, and what to
// do. Controllers and nodes renew their own long before; one that did not is broken.
var warnings = map[string]struct {
	before time.Duration
	advice string
}{
	"authority":  {30 * 24 * time.Hour, "plan a new authority"},
	"controller": {30 * 24 * time.Hour, "it is not renewed by itself as it should be: look at the controller's log, and restart it"},
	"kubeconfig": {30 * 24 * time.Hour, "`timonel up` makes a new one"},
	"node":       {48 * time.Hour, "it is not renewed: look at its agent; once it has ended, the agent joins again with a new token"},
}

// expiries puts together what controllers say: of each its own, and of all else what
// the one says that has applied most.
func (s *Status) expiries() {
	var newest *ControllerStatus
	for i, c := range s.Controllers {
		if c.Answers && (newest == nil || c.Revision > newest.Revision) {
			newest = &s.Controllers[i]
		}
	}
	for i, c := range s.Controllers {
		for _, e := range c.Expiries {
			if c.Answers && (e.Kind == "controller" || newest == &s.Controllers[i]) {
				s.Expiries = append(s.Expiries, e)
			}
		}
	}
	slices.SortStableFunc(s.Expiries, func(a, b Expiry) int { return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.What, b.What)) })
}

// expiryProblems are about what ends soon or has ended.
func expiryProblems(expiries []Expiry, now time.Time) (out []string) {
	for _, e := range expiries {
		w, known := warnings[e.Kind]
		left := e.At.Sub(now)
		switch {
		case !known || left >= w.before:
		case left <= 0:
			out = append(out, fmt.Sprintf("the certificate of %s has expired, at %s: %s", e.What, e.At.Format(time.RFC3339), w.advice))
		default:
			out = append(out, fmt.Sprintf("the certificate of %s expires in %s, at %s: %s", e.What, Days(left), e.At.Format(time.RFC3339), w.advice))
		}
	}
	return out
}

// Days is a duration as people say it: in days, below two of them in hours, and
// below two of those in minutes.
func Days(d time.Duration) string {
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	case d >= 2*time.Hour:
		return fmt.Sprintf("%d hours", d/time.Hour)
	}
	return fmt.Sprintf("%d minutes", max(0, d/time.Minute))
}

func expiriesOf(list []*timonelv1.Expiry) (out []Expiry) {
	for _, e := range list {
		out = append(out, Expiry{What: e.GetWhat(), Kind: e.GetKind(), At: time.Unix(e.GetUnixSeconds(), 0).UTC()})
	}
	return out
}

// kubeconfigExpiry is when the administrator's certificate ends. Without a
// kubeconfig that has one there is nothing to tell.
func kubeconfigExpiry(path string) (Expiry, bool) {
	config, err := clientcmd.LoadFromFile(path)
	if err != nil {
		return Expiry{}, false
	}
	var at time.Time
	for _, u := range config.AuthInfos {
		block, _ := pem.Decode(u.ClientCertificateData)
		if block == nil {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err == nil && (at.IsZero() || cert.NotAfter.Before(at)) {
			at = cert.NotAfter.UTC()
		}
	}
	return Expiry{What: "the administrator in " + path, Kind: "kubeconfig", At: at}, !at.IsZero()
}
