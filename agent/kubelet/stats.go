package kubelet

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"timonel/agent/hostile"
)

func (s *Server) summary(w http.ResponseWriter, r *http.Request) {
	sum, err := s.stats(r.Context())
	if err != nil {
		fail(w, err)
		return
	}
	writeJSON(w, sum)
}

// stats gathers what CRI counts of containers, and the machine's own figures.
func (s *Server) stats(ctx context.Context) (*stats.Summary, error) {
	resp, err := s.cfg.Runtime.ListContainerStats(ctx, &runtimev1.ListContainerStatsRequest{})
	if err != nil {
		return nil, fmt.Errorf("container statistics: %w", err)
	}
	byPod := map[string][]stats.ContainerStats{}
	for _, c := range resp.Stats {
		labels := c.GetAttributes().GetLabels()
		cs := stats.ContainerStats{Name: labels["io.kubernetes.container.name"]}
		if cpu := c.GetCpu(); cpu != nil {
			cs.CPU = &stats.CPUStats{Time: metav1.NewTime(time.Unix(0, cpu.Timestamp))}
			if v := cpu.GetUsageCoreNanoSeconds(); v != nil {
				cs.CPU.UsageCoreNanoSeconds = &v.Value
			}
			if v := cpu.GetUsageNanoCores(); v != nil {
				cs.CPU.UsageNanoCores = &v.Value
			}
		}
		if mem := c.GetMemory(); mem != nil {
			cs.Memory = &stats.MemoryStats{Time: metav1.NewTime(time.Unix(0, mem.Timestamp))}
			if v := mem.GetWorkingSetBytes(); v != nil {
				cs.Memory.WorkingSetBytes = &v.Value
			}
			if v := mem.GetUsageBytes(); v != nil {
				cs.Memory.UsageBytes = &v.Value
			}
		}
		uid := labels["io.kubernetes.pod.uid"]
		byPod[uid] = append(byPod[uid], cs)
	}
	sum := &stats.Summary{Node: NodeStats(s.cfg.NodeName), Pods: []stats.PodStats{}}
	for _, pod := range s.cfg.Pods.Pods() {
		ps := stats.PodStats{
			PodRef:     stats.PodReference{Name: pod.Name, Namespace: pod.Namespace, UID: string(pod.UID)},
			Containers: byPod[string(pod.UID)],
		}
		if pod.Status.StartTime != nil {
			ps.StartTime = *pod.Status.StartTime
		}
		if ps.Containers == nil {
			ps.Containers = []stats.ContainerStats{}
		}
		if s.cfg.Volumes != nil {
			ps.VolumeStats = s.cfg.Volumes(pod)
		}
		sum.Pods = append(sum.Pods, ps)
	}
	return sum, nil
}

// NodeStats are the machine's own figures.
func NodeStats(name string) stats.NodeStats {
	now := metav1.Now()
	n := stats.NodeStats{NodeName: name}
	if raw, err := hostile.ReadRegular("/proc/stat", hostile.MaxOwn); err == nil {
		line, _, _ := strings.Cut(string(raw), "\n")
		var busy uint64
		for i, f := range strings.Fields(line) {
			v, err := strconv.ParseUint(f, 10, 64)
			if err == nil && i != 4 && i != 5 { // not idle, not iowait
				busy += v
			}
		}
		nanos := busy * uint64(time.Second/100)
		n.CPU = &stats.CPUStats{Time: now, UsageCoreNanoSeconds: &nanos}
	}
	if raw, err := hostile.ReadRegular("/proc/meminfo", hostile.MaxOwn); err == nil {
		kb := map[string]uint64{}
		for line := range strings.Lines(string(raw)) {
			key, rest, ok := strings.Cut(line, ":")
			if f := strings.Fields(rest); ok && len(f) > 0 {
				kb[key], _ = strconv.ParseUint(f[0], 10, 64)
			}
		}
		total, available := kb["MemTotal"]<<10, kb["MemAvailable"]<<10
		used := total - available
		n.Memory = &stats.MemoryStats{Time: now, AvailableBytes: &available, UsageBytes: &used, WorkingSetBytes: &used}
	}
	return n
}

// resourceMetrics is the part of the summary that metrics-server reads.
func (s *Server) resourceMetrics(w http.ResponseWriter, r *http.Request) {
	sum, err := s.stats(r.Context())
	if err != nil {
		fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	var cpu, mem strings.Builder
	cpu.WriteString("# HELP container_cpu_usage_seconds_total Cumulative cpu time consumed by the container in core-seconds\n# TYPE container_cpu_usage_seconds_total counter\n")
	mem.WriteString("# HELP container_memory_working_set_bytes Current working set of the container in bytes\n# TYPE container_memory_working_set_bytes gauge\n")
	for _, p := range sum.Pods {
		for _, c := range p.Containers {
			labels := fmt.Sprintf("{container=%q,namespace=%q,pod=%q}", c.Name, p.PodRef.Namespace, p.PodRef.Name)
			if c.CPU != nil && c.CPU.UsageCoreNanoSeconds != nil {
				fmt.Fprintf(&cpu, "container_cpu_usage_seconds_total%s %g %d\n", labels, float64(*c.CPU.UsageCoreNanoSeconds)/1e9, c.CPU.Time.UnixMilli())
			}
			if c.Memory != nil && c.Memory.WorkingSetBytes != nil {
				fmt.Fprintf(&mem, "container_memory_working_set_bytes%s %d %d\n", labels, *c.Memory.WorkingSetBytes, c.Memory.Time.UnixMilli())
			}
		}
	}
	fmt.Fprint(w, cpu.String(), mem.String())
	if c := sum.Node.CPU; c != nil {
		fmt.Fprintf(w, "# HELP node_cpu_usage_seconds_total Cumulative cpu time consumed by the node in core-seconds\n# TYPE node_cpu_usage_seconds_total counter\nnode_cpu_usage_seconds_total %g %d\n", float64(*c.UsageCoreNanoSeconds)/1e9, c.Time.UnixMilli())
	}
	if m := sum.Node.Memory; m != nil {
		fmt.Fprintf(w, "# HELP node_memory_working_set_bytes Current working set of the node in bytes\n# TYPE node_memory_working_set_bytes gauge\nnode_memory_working_set_bytes %d %d\n", *m.WorkingSetBytes, m.Time.UnixMilli())
	}
}

// metrics are those of the node's other parts.
func (s *Server) metrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	if s.cfg.Metrics != nil {
		s.cfg.Metrics(w)
	}
}
