// Package admission decides whether a node takes a pod that was bound to it,
// with the kubelet's reasons and messages. The scheduler may be wrong or not
// asked at all (spec.nodeName), and a field that the node does not carry out is
// refused, not ignored: what isolates a container must never be dropped in
// silence.
//
//	if r := admission.Admit(pod, &node); r != nil {
//		// The pod is Failed with r.Reason and r.Message. It is not tried again.
//	}
//
// [Admit] is a pure function. It is asked once for each pod, before anything of
// the pod is started; a pod that was started is never asked about again.
//
// [Fields] is the list of every field of a pod's spec and what the node does
// with it: done, refused, or meaningless on a node. A test holds it against
// upstream's types, and docs/pod-fields.md is made from it.
package admission
