package apiserver

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// BenchmarkCreate creates ConfigMaps from 32 clients and from one, in memory and
// by TLS. Clients by TLS have a connection each.
func BenchmarkCreate(b *testing.B) {
	f, err := commonServer()
	if err != nil {
		b.Fatal(err)
	}
	pair, err := f.bundle.ClientCert("admin", []string{"system:masters"})
	if err != nil {
		b.Fatal(err)
	}
	var serial atomic.Int64
	for _, way := range []struct {
		name   string
		config func() *rest.Config
	}{
		{"memory", f.admin},
		{"network", func() *rest.Config {
			config := f.anonymous()
			config.ContentType, config.CertData, config.KeyData = "application/vnd.kubernetes.protobuf", pair.Cert, pair.Key
			return config
		}},
	} {
		for _, clients := range []int{1, 32} {
			b.Run(fmt.Sprintf("%s/clients=%d", way.name, clients), func(b *testing.B) {
				work := make(chan struct{}, clients)
				done := make(chan error, clients)
				for range clients {
					c, err := kubernetes.NewForConfig(way.config())
					if err != nil {
						b.Fatal(err)
					}
					go func() {
						for range work {
							name := fmt.Sprint("bench-", serial.Add(1))
							_, err := c.CoreV1().ConfigMaps("default").Create(context.Background(),
								configMap(name, map[string]string{"key": strings.Repeat("v", 256)}), metav1.CreateOptions{})
							if err != nil {
								b.Error(err)
							}
						}
						done <- nil
					}()
				}
				b.ResetTimer()
				for range b.N {
					work <- struct{}{}
				}
				close(work)
				for range clients {
					<-done
				}
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "creates/s")
			})
		}
	}
}

// BenchmarkRead gets a ConfigMap, and lists 1,000 of them, by TLS.
func BenchmarkRead(b *testing.B) {
	f, err := commonServer()
	if err != nil {
		b.Fatal(err)
	}
	pair, err := f.bundle.ClientCert("admin", []string{"system:masters"})
	if err != nil {
		b.Fatal(err)
	}
	config := f.anonymous()
	config.ContentType, config.CertData, config.KeyData = "application/vnd.kubernetes.protobuf", pair.Cert, pair.Key
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		b.Fatal(err)
	}
	ctx := context.Background()
	if _, err := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "read"}}, metav1.CreateOptions{}); err == nil {
		for i := range 1000 {
			if _, err := c.CoreV1().ConfigMaps("read").Create(ctx, configMap(fmt.Sprint("read-", i), map[string]string{"key": strings.Repeat("v", 1024)}), metav1.CreateOptions{}); err != nil {
				b.Fatal(err)
			}
		}
	}
	for name, read := range map[string]func() error{
		"get": func() error {
			_, err := c.CoreV1().ConfigMaps("read").Get(ctx, "read-1", metav1.GetOptions{})
			return err
		},
		"list": func() error { _, err := c.CoreV1().ConfigMaps("read").List(ctx, metav1.ListOptions{}); return err },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err := read(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkStart reports how long a start takes until ready, and the memory of
// the idle server's process. Run it alone: go test -run xxx -bench Start.
func BenchmarkStart(b *testing.B) {
	f, err := commonServer()
	if err != nil {
		b.Fatal(err)
	}
	time.Sleep(15 * time.Second) // the last of what follows a start
	runtime.GC()
	debug.FreeOSMemory()
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	b.ReportMetric(f.ready.Seconds(), "s-to-ready")
	b.ReportMetric(float64(memory.HeapAlloc)/(1<<20), "MB-heap")
	b.ReportMetric(status(b, "RssAnon"), "MB-anon")
	b.ReportMetric(status(b, "RssFile"), "MB-file")
	b.ReportMetric(float64(runtime.NumGoroutine()), "goroutines")
}

// status reads a size from /proc/self/status, in MB.
func status(b *testing.B, field string) float64 {
	file, err := os.Open("/proc/self/status")
	if err != nil {
		b.Skip(err)
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		var kilobytes float64
		if n, _ := fmt.Sscanf(lines.Text(), field+": %f kB", &kilobytes); n == 1 {
			return kilobytes / 1024
		}
	}
	b.Fatalf("/proc/self/status has no %s", field)
	return 0
}
