package reconcile

import (
	"math/rand/v2"

	"k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NamePrefix is what the names of an owner's pods begin with.
func NamePrefix(owner string) string {
	if prefix := owner + "-"; len(validation.NameIsDNSSubdomain(prefix, true)) == 0 {
		return prefix
	}
	return owner
}

const (
	// nameLetters are those that make no words and look unlike each other, as in Kubernetes.
	nameLetters = "bcdfghjklmnpqrstvwxz2456789"
	nameSuffix  = 5
	maxName     = 63
)

// Names makes the names of an owner's new objects, pods unless taken is replaced.
// They follow from the seed, so that a pass can be repeated, and are known before
// the objects are created.
type Names struct {
	prefix string
	random *rand.Rand
	used   map[string]bool
	Taken  func(name string) bool
}

func NewNames(in Input, owner metav1.Object) *Names {
	prefix := NamePrefix(owner.GetName())
	if len(prefix) > maxName-nameSuffix {
		prefix = prefix[:maxName-nameSuffix]
	}
	return &Names{
		prefix: prefix, used: map[string]bool{},
		random: rand.New(rand.NewPCG(in.Seed, Hash(string(owner.GetUID())))),
		Taken: func(name string) bool {
			_, ok := in.Snapshot.Pods().Get(owner.GetNamespace(), name)
			return ok
		},
	}
}

// IndexPrefix is what the names of the pods of an owner that work on an index begin
// with. A long owner's name is cut, not the index.
func IndexPrefix(owner, index string) string {
	end := "-" + index + "-"
	if len(owner)+len(end) > maxName-nameSuffix {
		owner = owner[:maxName-nameSuffix-len(end)]
	}
	return owner + end
}

// Next returns a name that none has.
func (n *Names) Next() string { return n.NextOf(n.prefix) }

// NextOf returns a name that none has and that begins with prefix.
func (n *Names) NextOf(prefix string) string {
	for {
		suffix := make([]byte, nameSuffix)
		for i := range suffix {
			suffix[i] = nameLetters[n.random.IntN(len(nameLetters))]
		}
		name := prefix + string(suffix)
		if !n.used[name] && !n.Taken(name) {
			n.used[name] = true
			return name
		}
	}
}
