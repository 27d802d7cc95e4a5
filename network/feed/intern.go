package feed

import (
	discoveryv1 "k8s.io/api/discovery/v1"

	"timonel/network/feed/wire"
)

// maxInterned bounds the texts that are kept to be shared.
const maxInterned = 1 << 15

var yes, no = true, false

// interner lets endpoints share what is the same in many: nodes' names, zones,
// conditions.
type interner struct{ texts map[string]*string }

func (in *interner) text(s *string) *string {
	if s == nil {
		return nil
	}
	if shared := in.texts[*s]; shared != nil {
		return shared
	}
	if in.texts == nil || len(in.texts) >= maxInterned {
		in.texts = make(map[string]*string)
	}
	in.texts[*s] = s
	return s
}

func truth(b *bool) *bool {
	switch {
	case b == nil:
		return nil
	case *b:
		return &yes
	}
	return &no
}

func (in *interner) object(o *wire.Object) {
	if o.Slice == nil {
		return
	}
	in.slice(o.Slice)
}

func (in *interner) slice(s *discoveryv1.EndpointSlice) {
	s.Namespace = *in.text(&s.Namespace)
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		e.NodeName, e.Zone = in.text(e.NodeName), in.text(e.Zone)
		c := &e.Conditions
		c.Ready, c.Serving, c.Terminating = truth(c.Ready), truth(c.Serving), truth(c.Terminating)
	}
}
