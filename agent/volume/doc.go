// Package volume puts a pod's volumes on the node's disk: emptyDir, hostPath,
// configMap, secret, downwardAPI, projected (with service account tokens) and
// the binds that subPath needs. Setup may be called again at any time: it
// brings the content up to date, atomically for readers in the container.
//
// Everything lives below one folder a pod, DIR/UID, and Teardown removes that,
// mounts first.
package volume
