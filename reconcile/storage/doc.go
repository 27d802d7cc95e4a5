// Package storage has the reconcilers of volumes:
//
//	binder.go      which claim has which volume: keys, and what the rest is called from
//	claim.go       a claim finds, or asks for, its volume
//	volume.go      a volume follows its claim, and is reclaimed when that is gone
//	local.go       the provisioner that is built in: folders on the nodes
//	class.go       its StorageClass, made once
//	protection.go  what is used is not deleted: claims, volumes, attribute classes
//	ephemeral.go   the claims of pods' ephemeral volumes
//
// A claim and a volume are bound by several writes. The first makes the volume
// name the claim, on condition that nobody has changed the volume, so that of two
// claims which want one volume only one has it; the next makes the claim name the
// volume, on condition that nobody has changed the claim. Whatever stops in
// between is finished by the next pass, as upstream's controller does it: reasons,
// messages and order are its own.
//
// What is behind a local volume is the node's alone. It makes the folder when a pod
// first needs it, and deletes it when the PersistentVolume is being deleted, which
// the finalizer [LocalFinalizer] holds until the Node says so in the annotation
// [DeletedVolumesAnnotation]. docs/storage.md is about it.
package storage
