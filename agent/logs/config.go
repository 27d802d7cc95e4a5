package logs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Upstream's defaults.
const (
	DefaultMaxSize  = 10 << 20
	DefaultMaxFiles = 5
)

// MinMaxSize is the least size to rotate at: one line as containerd cuts them.
const MinMaxSize = 16 << 10

// MaxMaxFiles is how many files a log may be at most.
const MaxMaxFiles = 1000

// Runtime is what of CRI is needed.
type Runtime interface {
	ListContainers(ctx context.Context, in *runtimev1.ListContainersRequest, opts ...grpc.CallOption) (*runtimev1.ListContainersResponse, error)
	ContainerStatus(ctx context.Context, in *runtimev1.ContainerStatusRequest, opts ...grpc.CallOption) (*runtimev1.ContainerStatusResponse, error)
	ReopenContainerLog(ctx context.Context, in *runtimev1.ReopenContainerLogRequest, opts ...grpc.CallOption) (*runtimev1.ReopenContainerLogResponse, error)
}

// Config says what a container's logs may take.
type Config struct {
	// Dir has all logs. Those of containers elsewhere are left alone.
	Dir string
	// MaxSize is at how many bytes a log is rotated; negative: never.
	// Default DefaultMaxSize.
	MaxSize int64
	// MaxFiles is how many files a log is at most, with the one that is written
	// to. Default DefaultMaxFiles.
	MaxFiles int
	Runtime  Runtime
	// Now is the clock for names. Default time.Now.
	Now    func() time.Time
	Logger *slog.Logger
}

// SetDefaults fills what is empty and has a default.
func (c *Config) SetDefaults() {
	if c.MaxSize == 0 {
		c.MaxSize = DefaultMaxSize
	}
	if c.MaxFiles == 0 {
		c.MaxFiles = DefaultMaxFiles
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
}

// Validate names the first field that cannot work.
func (c *Config) Validate() error {
	switch {
	case !filepath.IsAbs(c.Dir):
		return fmt.Errorf("logs config: Dir %q is not an absolute path", c.Dir)
	case c.MaxSize >= 0 && c.MaxSize < MinMaxSize:
		return fmt.Errorf("logs config: MaxSize %d: want at least %d bytes, or a negative number for no rotation", c.MaxSize, MinMaxSize)
	case c.MaxSize > math.MaxInt64/MaxMaxFiles/2:
		return fmt.Errorf("logs config: MaxSize %d is more than any disk has", c.MaxSize)
	case c.MaxFiles < 2 || c.MaxFiles > MaxMaxFiles:
		return fmt.Errorf("logs config: MaxFiles %d: want 2 to %d", c.MaxFiles, MaxMaxFiles)
	case c.Runtime == nil:
		return errors.New("logs config: Runtime is nil")
	}
	return nil
}

// room is how many bytes the rotated files of a log may be together. A quarter
// of a file more than the product, because each is a little over its size when
// that is noticed.
func (c *Config) room() int64 { return int64(c.MaxFiles-1)*c.MaxSize + c.MaxSize/4 }
