package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	_ "time/tzdata" // CronJobs name time zones, and a machine may know none

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
)

// version is set by the linker (make build).
var version = "dev"

func main() {
	// A worker of the API server's or of Kubernetes' controllers that panics is logged
	// and goes on with its next piece of work, as in the kubelet: the other parts of this
	// process, the log first of all, are not to end with it.
	utilruntime.ReallyCrash = false
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "controller: "+oneLine(err))
		os.Exit(1)
	}
}

func command() *cobra.Command {
	// cobra adds the flags that packages define for all programs; those of Kubernetes'
	// are for its own.
	pflag.CommandLine = pflag.NewFlagSet("controller", pflag.ContinueOnError)
	c := defaultConfig()
	cmd := &cobra.Command{
		Use:           "controller",
		Short:         "Run one of a Timonel cluster's controllers",
		Version:       version,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.complete(); err != nil {
				return err
			}
			log, err := setUpLogs(c.logLevel, c.logFormat)
			if err != nil {
				return err
			}
			return run(cmd.Context(), c, log)
		},
	}
	c.flags(cmd.Flags())
	return cmd
}

// oneLine is the error as the last line of a log: joined errors are separated by
// semicolons.
func oneLine(err error) string {
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) && err.Error() == errors.Join(joined.Unwrap()...).Error() {
		var parts []string
		for _, e := range joined.Unwrap() {
			parts = append(parts, oneLine(e))
		}
		return strings.Join(parts, "; ")
	}
	return strings.ReplaceAll(err.Error(), "\n", " ")
}
