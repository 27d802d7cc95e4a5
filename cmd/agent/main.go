package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set when a release is built.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "agent: "+strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var o options
	root := &cobra.Command{
		Use:           "agent",
		Short:         "Run this machine's pods for a Timonel cluster",
		Version:       version,
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.purge {
				return cleanup(cmd.Context(), &o)
			}
			return run(cmd.Context(), &o)
		},
	}
	o.common(root.PersistentFlags())
	o.flags(root.Flags())
	root.AddCommand(&cobra.Command{
		Use:   "cleanup",
		Short: "End all containers of this agent and remove what it made on this machine",
		Long: "End all containers of the agent with this --name and --data-dir, stop its containerd, and remove its\n" +
			"mounts, cgroups and network devices and its data folder. The agent itself must have been stopped.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cleanup(cmd.Context(), &o) },
	})
	return root
}
