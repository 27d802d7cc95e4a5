// Package profiles reads the file that kube-scheduler is configured by, of kind
// KubeSchedulerConfiguration in kubescheduler.config.k8s.io/v1, and makes of it what
// timonel/sched is configured by.
//
//	config, err := profiles.Parse(content)
//
// It is decoded, defaulted and validated by upstream's own code, so that what upstream
// refuses is refused, in its words. What sched does not do is refused too, by the
// field's path and with what to do: extenders, plugins that upstream's scheduler does
// not have, plugins that cannot be left out (of SchedulingGates, PrioritySort,
// VolumeBinding and DefaultBinder), plugins of which only a part is left out, and
// arguments of what sched leaves out. What concerns kube-scheduler's own process alone
// (leaderElection, clientConnection, parallelism, profiling) has no use here.
//
// Filters are asked in upstream's default order, whatever the order in the file: which
// nodes fit does not depend on it, only which of several reasons is told.
package profiles
