// Package csi has CSI drivers mount volumes for pods of this node, as the kubelet does.
//
// A driver registers by [timonel/agent/plugin]. It is asked for what it can do and for what
// it calls this node, which the node's CSINode, a topology label or more and an annotation
// say from then on. A pod's volume is asked for with [Manager.Mount], again and again, and
// nothing waits: what is to be done for it is done beside, one deed at a time for each
// volume of a driver, and the pod is woken when that has come to something.
//
//	want    what pods ask for, by Mount and Release
//	record  what a driver was asked for, on disk before it is (record.go)
//	facts   driver, attachment, what is in use by the cluster's word
//
//	plan(state, facts, put off, now) -> the next deed (plan.go, pure)
//
// Deeds are NodeStageVolume, NodePublishVolume, NodeUnpublishVolume and NodeUnstageVolume
// (deeds.go). Each is bounded by 2 min, put off for 500 ms to 2 min 2 s when it fails, and
// may be done twice: CSI demands that drivers bear that. After a start of the agent the
// records say what may be there; what no pod asks for then is taken back when the pods'
// folders are ([Manager.Release]).
//
// A volume that others attach is not mounted before the Node says that it is in use, that
// it is attached, and its VolumeAttachment says so; it is said to be in use until the
// driver has unstaged it. So nobody takes it away from under a pod.
//
// # Folders
//
// Paths are the kubelet's, beneath the agent's data folder:
//
//	plugins_registry/                                     drivers' registration sockets
//	plugins/DRIVER/csi.sock                               where drivers serve, by custom
//	plugins/kubernetes.io/csi/DRIVER/HASH/globalmount     staging path
//	plugins/kubernetes.io/csi/volumeDevices/staging/NAME  likewise, of a block volume
//	plugins/kubernetes.io/csi/volumeDevices/publish/NAME/POD-UID
//	pods/POD-UID/volumes/kubernetes.io~csi/NAME/mount     target path
//
// Drivers are told of them beneath [Config.Seen], the folder as they have it mounted:
// /var/lib/kubelet in nearly all manifests.
//
// A driver is root on this node. What it answers is bounded all the same, its socket is
// reached through no link, it cannot take another's name, and what it leaves at a target
// path has to be a folder, or a block device, and not a link to one.
package csi
