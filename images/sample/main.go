// Command sample is the application of Timonel's sample image: an HTTP server
// that says which pod answered. It writes one line per request, answers
// /healthz with 200, and on SIGTERM finishes what it is serving.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "sample:", err)
		os.Exit(1)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	addr := ":8080"
	if port := os.Getenv("PORT"); port != "" {
		addr = ":" + port
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	pod := os.Getenv("POD_NAME")
	if pod == "" {
		pod = host
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Printf("%s %s %s\n", time.Now().UTC().Format(time.RFC3339), r.Method, r.URL.Path)
		fmt.Fprintf(w, "pod %s, host %s, time %s\n", pod, host, time.Now().UTC().Format(time.RFC3339Nano))
	})
	server := &http.Server{Addr: addr, Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan error, 1)
	go func() { done <- server.ListenAndServe() }()
	fmt.Printf("sample: pod %s listens on %s\n", pod, addr)
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	fmt.Println("sample: stopping")
	grace, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := server.Shutdown(grace); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
