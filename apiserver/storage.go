package apiserver

import (
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/generic"
)

// stateOptions gives every registry its storage over the state; versions,
// encoding and prefixes stay those of next.
type stateOptions struct {
	next      generic.RESTOptionsGetter
	decorator generic.StorageDecorator
}

// overState returns options that are next's but for where objects are kept.
func (s *shared) overState(next generic.RESTOptionsGetter) generic.RESTOptionsGetter {
	return stateOptions{next: next, decorator: s.decorator}
}

// GetRESTOptions implements generic.RESTOptionsGetter.
func (s stateOptions) GetRESTOptions(resource schema.GroupResource, example runtime.Object) (generic.RESTOptions, error) {
	options, err := s.next.GetRESTOptions(resource, example)
	if err != nil {
		return generic.RESTOptions{}, err
	}
	options.Decorator = s.decorator
	return options, nil
}
