// Command kubernetes is nothing to run: its module pins what `make bench` builds
// Kubernetes' control plane from (`go build k8s.io/kubernetes/cmd/...`), the
// controller manager included, whose modules Timonel itself has no use for.
package main

func main() {}
