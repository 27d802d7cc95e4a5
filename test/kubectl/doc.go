// Command kubectl runs upstream's kubectl tests, test/cmd of Kubernetes' source, on a
// cluster of its own without agents, and prints what passed:
//
//	make kubectl-tests                        # all
//	make kubectl-tests WHAT='crd kubectl_get' # run_crd_tests and run_kubectl_get_tests
//	make kubectl-tests KEEP=1                 # leave the cluster for a look at it
//
// What upstream's own start of these tests gives them and this one does not: a token
// that is a file's (here it is a service account's, bound to cluster-admin), and an API
// server on loopback (here it is reached by a forwarder there). Plug-ins of admission
// that upstream turns off for these tests are off here too.
//
// failing.txt lists what does not pass, with the reason. A test that fails and is not on
// it fails the run, and so does one that is on it and passes: take it off then.
package main
