// Command runtime is nothing to run: its module pins what `make runtime` builds from
// source: containerd with its shim, and runc.
package main

func main() {}
