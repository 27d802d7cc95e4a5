// Package weigh says what encoded objects take in memory when they are decoded, without
// decoding them: at most that, and not much less. Whoever answers for a bound in bytes
// asks it of what clients wrote, who choose how little of an encoding a value needs.
//
//	weigh.Decoded(value)  // as an object
//	weigh.Indented(value) // what a line for each value adds to it as JSON or YAML
package weigh

import "bytes"

// protobufPrefix begins protobuf encodings of Kubernetes' objects.
var protobufPrefix = []byte("k8s\x00")

// What a stored object takes when it is decoded, as measured with objects made for that
// (see TestDecoded): those of built-in kinds with as many containers, tolerations and
// variables as fit, and custom resources of empty objects and lists.
const (
	perObject   = 1024
	perByte     = 2
	mostPerByte = 13
	perField    = 80  // of protobuf
	perValue    = 80  // of JSON as maps
	perJSONNode = 384 // an object of JSON as a map
)

// Decoded is how much memory a stored object takes when it is decoded: one in protobuf as a
// struct, one in JSON as maps.
func Decoded(value []byte) int64 {
	if bytes.HasPrefix(value, protobufPrefix) {
		return perObject + perByte*int64(len(value)) + perField*Protobuf(value)
	}
	values, objects := JSON(value)
	return perObject + perByte*int64(len(value)) + perValue*values + perJSONNode*objects
}

// Hidden is Decoded for an object that cannot be looked into, such as one that is encrypted:
// as much as one of its size takes, but for custom resources of nothing but empty objects.
func Hidden(value []byte) int64 {
	return perObject + mostPerByte*int64(len(value))
}

// Indented is how many bytes are added to an encoded object when it is written as JSON or
// YAML with a line for each value, indented by two spaces for each object and list that it
// is in. JSON within protobuf counts too; what looks like it in a string is counted as if it
// was.
func Indented(value []byte) (bytes int64) {
	depth := int64(0)
	for _, c := range value {
		switch c {
		case '{', '[':
			depth++
			bytes += 2*depth + 1
		case '}', ']':
			depth = max(depth-1, 0)
			bytes += 2*depth + 1
		case ',':
			bytes += 2*depth + 1
		}
	}
	return bytes
}
