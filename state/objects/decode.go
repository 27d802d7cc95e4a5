package objects

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/state"
)

// Meta is what is known of an object of any kind. It is shared and must not be
// changed.
type Meta struct {
	// Key is the storage key.
	Key string
	// GVK is the group, version and kind that the object is stored as.
	GVK schema.GroupVersionKind
	*metav1.ObjectMeta
	// Object is the whole object if its kind has a table, else nil.
	Object runtime.Object
	// JSON is the whole object as it is stored, if that is JSON and its kind has no
	// table, as custom resources and their definitions have none. The bytes are the
	// store's: they cost nothing, and must not be changed.
	JSON []byte
	// Revision is the object's resourceVersion as a number.
	Revision int64

	size int // of the encoding of what is decoded or kept
}

var protobufPrefix = []byte{'k', '8', 's', 0}

var errNotAnObject = errors.New("neither a protobuf nor a JSON object")

// decode reads a stored object: all of it if its kind is k's, else its metadata.
func decode(kv *state.KV, k kind) (*Meta, error) {
	var m *Meta
	var err error
	if raw, ok := bytes.CutPrefix(kv.Value, protobufPrefix); ok {
		m, err = decodeProtobuf(raw, k)
	} else if b := bytes.TrimLeft(kv.Value, " \t\r\n"); len(b) > 0 && b[0] == '{' {
		m, err = decodeJSON(b, k)
	} else {
		err = errNotAnObject
	}
	if err != nil {
		return nil, fmt.Errorf("decode %s at revision %d: %w", kv.Key, kv.ModRevision, err)
	}
	m.Key, m.Revision = kv.Key, kv.ModRevision
	m.ResourceVersion = strconv.FormatInt(kv.ModRevision, 10)
	m.ManagedFields = nil
	if m.Object == nil {
		m.size = m.ObjectMeta.Size() + len(m.JSON)
	} else {
		m.size = len(kv.Value)
		m.Object.GetObjectKind().SetGroupVersionKind(m.GVK)
	}
	return m, nil
}

// decodeProtobuf reads a runtime.Unknown: field 1 is the TypeMeta, field 2 the
// object, whose own field 1 is its ObjectMeta.
func decodeProtobuf(b []byte, k kind) (*Meta, error) {
	var raw []byte
	var m Meta
	err := fields(b, func(n protowire.Number, value []byte) error {
		switch n {
		case 1:
			var apiVersion, kind string
			if err := fields(value, func(n protowire.Number, value []byte) error {
				switch n {
				case 1:
					apiVersion = string(value)
				case 2:
					kind = string(value)
				}
				return nil
			}); err != nil {
				return err
			}
			m.GVK = schema.FromAPIVersionAndKind(apiVersion, kind)
		case 2:
			raw = value
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if k.new != nil && m.GVK == k.gvk {
		o := k.new()
		if err := o.Unmarshal(raw); err != nil {
			return nil, err
		}
		return m.of(o)
	}
	m.ObjectMeta = &metav1.ObjectMeta{}
	err = fields(raw, func(n protowire.Number, value []byte) error {
		if n == 1 {
			return m.ObjectMeta.Unmarshal(value)
		}
		return nil
	})
	return &m, err
}

// of points m at o.
func (m *Meta) of(o object) (*Meta, error) {
	om, ok := o.GetObjectMeta().(*metav1.ObjectMeta)
	if !ok {
		return nil, fmt.Errorf("%s has no metadata", m.GVK)
	}
	m.Object, m.ObjectMeta = o, om
	return m, nil
}

// fields calls f with each length-delimited field of a protobuf message.
func fields(b []byte, f func(protowire.Number, []byte) error) error {
	for len(b) > 0 {
		number, wire, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if wire != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, wire, b); n < 0 {
				return protowire.ParseError(n)
			}
			b = b[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := f(number, value); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func decodeJSON(b []byte, k kind) (*Meta, error) {
	var partial metav1.PartialObjectMetadata
	if err := json.Unmarshal(b, &partial); err != nil {
		return nil, err
	}
	m := &Meta{GVK: partial.GroupVersionKind(), ObjectMeta: &partial.ObjectMeta}
	if k.new == nil || m.GVK != k.gvk {
		m.JSON = b
		return m, nil
	}
	o := k.new()
	if err := json.Unmarshal(b, o); err != nil {
		return nil, err
	}
	return m.of(o)
}
