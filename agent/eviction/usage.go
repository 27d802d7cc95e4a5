package eviction

import "k8s.io/apimachinery/pkg/types"

// Reason is the reason of a pod's status, and of its event.
const Reason = "Evicted"

// Disk is how much of a file system something takes.
type Disk struct{ Bytes, Inodes int64 }

func (d Disk) add(o Disk) Disk { return Disk{d.Bytes + o.Bytes, d.Inodes + o.Inodes} }

// Usage is what one pod takes of its node.
type Usage struct {
	UID types.UID
	// Volumes are the emptyDirs on the node's disk, by name. Those on memory are
	// file systems of their own, with a size, and are not here.
	Volumes map[string]Disk
	// Containers are those that run.
	Containers []ContainerUsage
	// Other is what else the pod has on the node's disk: logs of containers that
	// have ended, termination messages, its hosts file.
	Other Disk
	// Memory is the working set in bytes, Processes how many there are.
	Memory, Processes int64
}

// ContainerUsage is what one container takes.
type ContainerUsage struct {
	Name string
	// Rootfs is its writable layer.
	Rootfs Disk
	Logs   Disk
	Memory int64
}

// parts are containers' layers, and all else.
func (u *Usage) parts() (layers, rest Disk) {
	rest = u.Other
	for _, d := range u.Volumes {
		rest = rest.add(d)
	}
	for i := range u.Containers {
		layers, rest = layers.add(u.Containers[i].Rootfs), rest.add(u.Containers[i].Logs)
	}
	return layers, rest
}

// ephemeral is all that counts as the pod's ephemeral storage.
func (u *Usage) ephemeral() Disk {
	layers, rest := u.parts()
	return layers.add(rest)
}

// Running are the containers that run, by pod.
type Running map[types.UID][]Container

// Container is one that runs.
type Container struct{ ID, Name string }

// Stop says when enough is known of what something takes: a pod that is over a
// limit need not be measured to its end. Zero: measure all.
type Stop struct {
	Volumes, Containers map[string]int64
	Pod                 int64
	// Pause is called now and then while measuring.
	Pause func() error
}
