// Command lint keeps the agent from reaching files by path: what a container,
// an image, a registry or a peer wrote on a node goes through agent/hostile,
// where it is opened beneath a root, without links, and read through a limit.
// It fails on any use in agent/ of what opens, changes or walks by path or reads
// without a limit, but for those that allow.go lists, each with its reason. An
// entry that nothing needs any more fails too.
//
//	go run ./internal/lint
//
// It reads the source alone, so it takes no build; tests are not looked at.
package main
