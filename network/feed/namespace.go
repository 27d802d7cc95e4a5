package feed

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// ServicesIn are the Services of a namespace in the order of their names.
func (v *View) ServicesIn(namespace string) (out []*corev1.Service) {
	prefix := namespace + nul
	v.services.Ascend(prefix, func(key string, s *corev1.Service) bool {
		if !strings.HasPrefix(key, prefix) {
			return false
		}
		out = append(out, s)
		return true
	})
	return out
}

// HasServices says whether there is any Service in a namespace.
func (v *View) HasServices(namespace string) (has bool) {
	prefix := namespace + nul
	v.services.Ascend(prefix, func(key string, _ *corev1.Service) bool {
		has = strings.HasPrefix(key, prefix)
		return false
	})
	return has
}
