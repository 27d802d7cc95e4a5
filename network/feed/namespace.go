package feed

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// HasServices says whether there is any Service in a namespace.
func (v *View) HasServices(namespace string) (has bool) {
	prefix := namespace + nul
	v.services.Ascend(prefix, func(key string, _ *corev1.Service) bool {
		has = strings.HasPrefix(key, prefix)
		return false
	})
	return has
}
