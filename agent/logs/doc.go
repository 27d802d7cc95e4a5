// Package logs keeps the logs of containers small and reads them.
//
// containerd writes what a container says to NAMESPACE_NAME_UID/CONTAINER/N.log.
// As the kubelet does, at --container-log-max-size bytes that file gets another
// name, containerd is told by CRI to begin a new one, older ones are compressed,
// and of all there are --container-log-max-files at most.
//
//	N.log                        written to, and what is read
//	N.log.20060102-150405        rotated last, plain: collectors may still read it
//	N.log.20060102-150401.gz     older
//
// How fast a container writes decides how often its log is looked at: a silent
// one costs nothing until its first write (inotify), a fast one is looked at
// every 20 ms. What is removed by that has a bound in bytes too, so that neither
// a fast container nor an agent that was away takes more of the disk. Containers
// that have ended are not rotated, but cut when they are longer than all files
// may be.
//
// Each step may be the last of an agent: the next one finds what is there by the
// names. A log without N.log is opened anew (or gets its name back when its
// container has ended), a file that was being made is removed, and so is a plain
// file whose compressed form is whole.
//
// The folder may be written to by pods that collect logs, so everything in it is
// reached by package hostile, and a file that containerd does not write to in
// place of N.log is put right.
//
// A [Reader] reads the file that is written to, as upstream, and with Follow each
// line once across rotations, compressed files too. It holds no line in memory. A
// file that has to go is taken from its readers, so a slow one costs no room; it
// is told that lines are missing.
//
//	logs.go        which containers there are
//	container.go   one container: when to look, what to do
//	rotate.go      one log: rotating, removing, cutting
//	compress.go    compressing
//	names.go       names of files
//	notify.go      being told of the first write
//	read.go        reading and following
//	line.go        CRI's form of a line
//	output.go      what was asked for
//	tail.go        where the last lines begin
package logs
