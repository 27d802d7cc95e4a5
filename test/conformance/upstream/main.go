// Command upstream is nothing to run: its module pins what `make conformance` builds
// from Kubernetes' own source: the test suite (`go test -c k8s.io/kubernetes/test/e2e`),
// ginkgo that runs it, kubectl that it calls, and the programs of its images.
package main

func main() {}
