package timonelv1

import "k8s.io/apimachinery/pkg/types"

// PodCertificatePrefix is what the names of all PodCertificateRequests begin with that
// an agent asks for, for one pod. The controllers find them by it.
func PodCertificatePrefix(pod types.UID) string { return "req-" + string(pod) + "-" }
