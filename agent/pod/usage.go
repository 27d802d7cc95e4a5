package pod

import (
	"context"
	"errors"
	"fmt"
	"path"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/cgroup"
	"timonel/agent/eviction"
	"timonel/agent/hostile"
	"timonel/agent/metering"
	"timonel/agent/volume"
)

// Layers finds the folder of a container's writable layer, "" where the runtime
// keeps it otherwise.
type Layers func(ctx context.Context, containerID string) (string, error)

// Beside finds what else a container may write on the node's disk through its runtime.
type Beside func(ctx context.Context, containerID string) ([]string, error)

// Running are the containers that run, by pod.
func (m *Manager) Running(ctx context.Context) (eviction.Running, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	list, err := m.cfg.Runtime.ListContainers(ctx, &runtimev1.ListContainersRequest{Filter: &runtimev1.ContainerFilter{
		State: &runtimev1.ContainerStateValue{State: runtimev1.ContainerState_CONTAINER_RUNNING},
	}})
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	out := eviction.Running{}
	for _, c := range list.Containers {
		uid := types.UID(c.Labels[labelPodUID])
		out[uid] = append(out[uid], eviction.Container{ID: c.Id, Name: c.Labels[labelContainerName]})
	}
	return out, nil
}

// Counters are what the containers that run have taken until now, by id.
func (m *Manager) Counters(ctx context.Context) (map[string]metering.Container, error) {
	running, err := m.Running(ctx)
	if err != nil {
		return nil, err
	}
	out := map[string]metering.Container{}
	for _, pod := range m.Pods() {
		parent := cgroupParent(m.cfg.CgroupRoot, pod)
		for _, c := range running[pod.UID] {
			group := path.Join(parent, c.ID)
			cpu, err := cgroup.CPUOf(group)
			if err != nil {
				return nil, err
			}
			memory, err := cgroup.UsageOf(group)
			if err != nil {
				return nil, err
			}
			out[c.ID] = metering.Container{Pod: pod.UID, Name: c.Name, CPU: cpu, Memory: uint64(memory.Memory)}
		}
	}
	return out, nil
}

// MeasureDisk measures what a pod takes of the node's disk. Containers are those
// of it that run. Where stop says that so much of something is enough to know,
// it may be more.
func (m *Manager) MeasureDisk(ctx context.Context, pod *corev1.Pod, containers []eviction.Container, stop eviction.Stop) (eviction.Usage, error) {
	u := eviction.Usage{UID: pod.UID, Volumes: map[string]eviction.Disk{}}
	total := int64(0) // so far, of what may be measured up to stop.Pod only
	measure := func(limit int64, how func(hostile.Measure) (hostile.Size, error)) (eviction.Disk, error) {
		if stop.Pod > 0 {
			if total > stop.Pod {
				return eviction.Disk{}, nil
			}
			if left := stop.Pod - total + 1; limit == 0 || left < limit {
				limit = left
			}
		}
		size, err := how(hostile.Measure{Stop: limit, Pause: stop.Pause})
		total += size.Bytes
		return eviction.Disk{Bytes: size.Bytes, Inodes: size.Inodes}, err
	}
	var errs []error
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		if !volume.OnDisk(v) {
			continue
		}
		d, err := measure(stop.Volumes[v.Name], func(how hostile.Measure) (hostile.Size, error) {
			return m.volumes.Measure(ctx, pod.UID, v.Name, how)
		})
		errs = append(errs, err)
		u.Volumes[v.Name] = d
	}
	other, err := measure(0, func(how hostile.Measure) (hostile.Size, error) { return m.volumes.MeasureOther(ctx, pod.UID, how) })
	errs = append(errs, err)
	u.Other = other
	seen, counted := map[string]bool{}, map[string]bool{}
	for _, c := range containers {
		if seen[c.Name] {
			continue
		}
		seen[c.Name] = true
		cu := eviction.ContainerUsage{Name: c.Name}
		cu.Logs, err = measure(0, func(how hostile.Measure) (hostile.Size, error) {
			return hostile.UsageIn(ctx, m.LogDir(pod), c.Name, how)
		})
		errs = append(errs, err)
		cu.Rootfs, err = measure(stop.Containers[c.Name], func(how hostile.Measure) (hostile.Size, error) { return m.measureLayer(ctx, c.ID, how) })
		errs = append(errs, err)
		for _, path := range m.beside(ctx, c.ID, &errs) {
			if counted[path] { // the containers of a pod share some
				continue
			}
			counted[path] = true
			more, err := measure(stop.Containers[c.Name], func(how hostile.Measure) (hostile.Size, error) {
				return hostile.UsageIn(ctx, filepath.Dir(path), filepath.Base(path), how)
			})
			errs = append(errs, err)
			cu.Rootfs.Bytes, cu.Rootfs.Inodes = cu.Rootfs.Bytes+more.Bytes, cu.Rootfs.Inodes+more.Inodes
		}
		u.Containers = append(u.Containers, cu)
	}
	return u, errors.Join(errs...)
}

// MeasureMemory adds what a pod takes of memory and process ids, by its cgroups, and
// of memory by its volumes.
func (m *Manager) MeasureMemory(pod *corev1.Pod, containers []eviction.Container, u *eviction.Usage) error {
	parent := cgroupParent(m.cfg.CgroupRoot, pod)
	whole, err := cgroup.UsageOf(parent)
	u.Memory, u.Processes = whole.Memory+m.volumes.Memory(pod), whole.Pids
	for _, c := range containers {
		one, oneErr := cgroup.UsageOf(path.Join(parent, c.ID))
		err = errors.Join(err, oneErr)
		u.Containers = append(u.Containers, eviction.ContainerUsage{Name: c.Name, Memory: one.Memory})
	}
	return err
}

func (m *Manager) measureLayer(ctx context.Context, id string, how hostile.Measure) (hostile.Size, error) {
	if m.cfg.Layers == nil {
		return hostile.Size{Whole: true}, nil
	}
	layer, err := m.cfg.Layers(ctx, id)
	if err != nil {
		return hostile.Size{}, fmt.Errorf("find the layer of container %s: %w", id, err)
	}
	if layer == "" {
		return m.layerByCRI(ctx, id)
	}
	return hostile.UsageIn(ctx, filepath.Dir(layer), filepath.Base(layer), how)
}

func (m *Manager) beside(ctx context.Context, id string, errs *[]error) []string {
	if m.cfg.Beside == nil {
		return nil
	}
	paths, err := m.cfg.Beside(ctx, id)
	if err != nil {
		*errs = append(*errs, fmt.Errorf("find what container %s may write beside its layer: %w", id, err))
	}
	return paths
}

// layerByCRI is the runtime's own figure.
func (m *Manager) layerByCRI(ctx context.Context, id string) (hostile.Size, error) {
	resp, err := m.cfg.Runtime.ContainerStats(ctx, &runtimev1.ContainerStatsRequest{ContainerId: id})
	if notFound(err) {
		return hostile.Size{Whole: true}, nil
	}
	if err != nil {
		return hostile.Size{}, fmt.Errorf("statistics of container %s: %w", id, err)
	}
	layer := resp.GetStats().GetWritableLayer()
	return hostile.Size{
		Bytes: int64(layer.GetUsedBytes().GetValue()), Inodes: int64(layer.GetInodesUsed().GetValue()), Whole: true,
	}, nil
}
