// Package desired keeps what the controllers last asked of this node: its pods
// and the ConfigMaps, Secrets, ServiceAccounts, claims and volumes that they refer to. It is
// kept in memory for the pod workers and on disk for the next start, so that a
// node that is cut off goes on by its last known desired state, after a reboot
// too.
//
// Writes to disk happen apart from the stream's goroutine. What fails is put back
// and tried again, and the position is written after everything it covers: after a
// crash the store may be older than what was received, never newer than what it
// holds. So a process that begins asks for a full list, whatever it found; later
// streams say what the store has ([Store.Have]) and get the difference.
package desired
