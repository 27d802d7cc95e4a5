package main

import (
	"fmt"
	"os"
)

func main() {
	found, err := check(".", allowed)
	if err != nil {
		fmt.Fprintln(os.Stderr, "lint:", err)
		os.Exit(1)
	}
	for _, f := range found {
		fmt.Fprintln(os.Stderr, f)
	}
	if len(found) > 0 {
		fmt.Fprintln(os.Stderr, "lint: use agent/hostile for what others wrote; what is the agent's own alone, and cannot be seen by a container, belongs in internal/lint/allow.go with the reason")
		os.Exit(1)
	}
}
