// Command etcd is etcd's own server, from its published module, built by
// `make bench` as the other side of the measurements.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
