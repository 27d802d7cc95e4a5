// Package job holds the reconcilers of work that ends: [Job] runs pods until as many
// have succeeded as are wanted, [CronJob] makes Jobs at times of a schedule, and [TTL]
// deletes Jobs some time after they have ended.
//
// A pod is counted exactly once, whoever leads when. It carries a finalizer until its
// Job's status holds its count, in steps each of which is decided on what the one
// before it has left in the state:
//
//	pod ends ──▶ its UID is in status.uncountedTerminatedPods (its index in
//	             status.completedIndexes) ──▶ its finalizer is removed ──▶
//	             status.succeeded or status.failed counts it, its UID is gone
//
// So is the end of a Job: the status first says that the Job is to end and why
// (SuccessCriteriaMet or FailureTarget), then the pods that still run are deleted, and
// when none is left and all are counted, the Job is Complete or Failed.
//
// How long a Job waits before it replaces a pod that failed follows from the times at
// which its pods ended, so that a new leader waits as long as the old one would have.
package job
