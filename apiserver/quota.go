package apiserver

import (
	"context"
	pathpkg "path"

	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/plugin/resourcequota"

	"timonel/state"
)

// skipQuota returns a decorator of admission plugins: that for ResourceQuotas is
// asked about namespaces that have any. It would hand each request to workers of its
// own to find out, in a cache that may be 30 s old; the state is at hand. root is
// the prefix of the keys of all objects.
func skipQuota(store func() *state.Store, root string) admission.Decorator {
	prefix := pathpkg.Join("/", root, "resourcequotas") + "/"
	return admission.DecoratorFunc(func(plugin admission.Interface, name string) admission.Interface {
		quota, ok := plugin.(admission.ValidationInterface)
		if name != resourcequota.PluginName || !ok {
			return plugin
		}
		return &whereQuota{ValidationInterface: quota, has: func(namespace string) bool {
			for range store().View().Range(prefix+namespace+"/", "") {
				return true
			}
			return false
		}}
	})
}

// whereQuota is the plugin for ResourceQuotas, asked where there are any.
type whereQuota struct {
	admission.ValidationInterface
	has func(namespace string) bool
}

// Validate implements admission.ValidationInterface.
func (q *whereQuota) Validate(ctx context.Context, a admission.Attributes, o admission.ObjectInterfaces) error {
	if !q.has(a.GetNamespace()) {
		return nil
	}
	return q.ValidationInterface.Validate(ctx, a, o)
}
