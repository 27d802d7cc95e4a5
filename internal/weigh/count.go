package weigh

import (
	"bytes"

	"google.golang.org/protobuf/encoding/protowire"
)

// JSON counts the values of a JSON document, and the objects among them, without
// decoding it. Of what is not JSON, which is refused by the decoder before it makes
// anything of it, the counts mean nothing.
func JSON(b []byte) (values, objects int64) {
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case ',', '[':
			values++
		case '{':
			objects++
		case '"':
			i++
			for i < len(b) && b[i] != '"' {
				next := bytes.IndexAny(b[i:], `"\`)
				if next < 0 {
					return values, objects
				}
				if i += next; b[i] == '\\' {
					i += 2
				}
			}
		}
	}
	return values, objects
}

// MostDepth is how deep messages are looked into. What is below is taken for the
// smallest messages that there are, two bytes each.
const MostDepth = 64

// Protobuf counts what may be messages or strings in a protobuf encoding, as deep as
// there are any. What is no message but looks like one is counted too.
func Protobuf(b []byte) (fields int64) { return protobufFields(bytes.TrimPrefix(b, protobufPrefix), 0) }

func protobufFields(b []byte, depth int) (fields int64) {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fields
		}
		b = b[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
				return fields
			}
			b = b[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return fields
		}
		b = b[n:]
		fields++
		switch {
		case depth == MostDepth:
			fields += int64(len(value) / 2)
		case len(value) > 1:
			fields += protobufFields(value, depth+1)
		}
	}
	return fields
}
