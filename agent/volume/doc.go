// Package volume puts a pod's volumes on the node: emptyDir, hostPath,
// configMap, secret, downwardAPI, projected (with service account tokens and pod
// certificates), images, what is behind claims (local, hostPath, CSI) and the binds that
// subPath needs. Setup may be called again at any time: it brings the content up to date,
// atomically for readers in the container.
//
// Everything lives below one folder a pod, DIR/UID, and Teardown removes that,
// mounts first:
//
//	volumes/   one folder a volume, which containers have mounted
//	subpaths/  what a subPath led to, pinned by a mount of its own
//	tokens/    the service account tokens that were issued; no container sees it
//	certificates/
//	           keys and certificates, on a tmpfs; likewise
//	claims/    which PersistentVolume each volume of a claim is
//
// But the node's own PersistentVolumes, which outlive pods, are below LOCALDIR, named
// as the volume is, whatever that says of its path; they go when the volume is being
// deleted ([Manager.DeleteLocal]) and not before.
//
// What containers see is theirs to attack: volumes of API data are on a tmpfs
// of their own each, are mounted read-only ([ReadOnly]), and are still written
// as if a container could change them at any moment; what was written there is
// compared, never believed. All of it goes through package hostile.
//
//	atomic.go    the writer of API data
//	payload.go, token.go, trust.go, certificate.go
//	             what is in it
//	tmpfs.go     where it is; emptyDir
//	image.go     images, mounted once they were pulled ([Manager.MountImage])
//	subpath.go, hostpath.go
//	claim.go     which PersistentVolume a claim has, and where that is
//	local.go     those that are the node's own
//	csi.go       those that CSI drivers mount (package csi)
package volume
