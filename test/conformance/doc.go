// Command conformance runs upstream's conformance tests on a cluster of its own, and
// prints for each SIG what passed and what did not, and why:
//
//	make conformance                              # all 462: the parallel ones, then [Serial]
//	make conformance FOCUS='sig-storage.*Secret'  # a regular expression of names; SKIP= likewise
//	make conformance FOCUS=… REPEAT=20 LOAD=1     # again and again, on a busy cluster
//	make conformance GROW=1                       # add what passed to passing.txt
//	make conformance KEEP=1                       # leave the cluster for a look at it
//	make conformance-part                         # those that part.txt lists, in a minute: of each SIG some
//
// passing.txt lists the tests that pass. One of them that fails, fails the run; the list
// only grows. A test that is not on it may fail: it says what there is still to do.
//
// The suite, ginkgo and kubectl are upstream's own, built from the module in upstream/;
// the images that its tests run are made by images/build of the same source and
// Debian's packages, and given names on a registry that is nowhere, so that no
// conformance test reaches outside this machine (registries.yaml). Tests with CSI
// drivers, which are no conformance tests, know their images by upstream's names all
// the same: leave them out of -labels and -focus.
//
// Reports are below the folder given by -out: ginkgo's output, its JSON and the suite's
// JUnit for each round.
package main
