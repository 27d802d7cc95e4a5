package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"k8s.io/client-go/kubernetes"
)

// profile fetches a profile from each API server at once, into the folder. What
// it returns waits for them.
func (s *side) profile(ctx context.Context, folder, row, path string) (wait func()) {
	var wg sync.WaitGroup
	if folder == "" {
		return wg.Wait
	}
	path, query, _ := strings.Cut(path, "?")
	for i, api := range s.apis {
		wg.Go(func() {
			client, err := kubernetes.NewForConfig(api)
			var content []byte
			if err == nil {
				request := client.Discovery().RESTClient().Get().AbsPath("/debug/pprof/" + path)
				if name, value, ok := strings.Cut(query, "="); ok {
					request.Param(name, value)
				}
				content, err = request.DoRaw(ctx)
			}
			if err == nil {
				name := strings.ReplaceAll(strings.ReplaceAll(s.name, ",", ""), " ", "-")
				err = os.WriteFile(filepath.Join(folder, fmt.Sprintf("%s-%s-%d.pprof", name, row, i+1)), content, 0o600)
			}
			if err != nil {
				fmt.Fprintf(os.Stderr, "  profile of server %d: %v\n", i+1, err)
			}
		})
	}
	return wg.Wait
}
