// Package upstream holds no code, only a test: that sched says of each node what
// Kubernetes' own scheduler plugins say, in the same words and with the same
// scores. It is apart from sched's tests because it is slow to compile.
package upstream
