package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"timonel/internal/cluster"
)

// version is set by the linker (make build).
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		if ctx.Err() != nil && errors.Is(err, context.Canceled) {
			err = errors.New("interrupted")
		}
		fmt.Fprintln(os.Stderr, "timonel: "+strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; "))
		stop()
		os.Exit(1)
	}
}

// tool holds the flags that every command has.
type tool struct {
	run  string
	name string
}

func command() *cobra.Command {
	t := &tool{}
	root := &cobra.Command{
		Use:           "timonel",
		Short:         "Run, break and look at a Timonel cluster",
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		// So that `timonel --run DIR kubectl …` takes --run for itself.
		TraverseChildren: true,
		RunE:             func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVar(&t.run, "run", environment("TIMONEL_RUN", "run"), "the cluster's folder (or TIMONEL_RUN)")
	root.PersistentFlags().StringVar(&t.name, "name", environment("TIMONEL_NAME", "timonel"), "the cluster's name (or TIMONEL_NAME)")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w: see `%s --help`", err, cmd.CommandPath())
	})
	root.AddGroup(&cobra.Group{ID: "cluster", Title: "The cluster:"},
		&cobra.Group{ID: "machine", Title: "One of its machines (c1, c2, …, a1, a2, …):"})
	for _, c := range []*cobra.Command{t.upCommand(), t.downCommand(), t.statusCommand(), t.tokenCommand(), t.nodeCommand(), t.gossipCommand(), t.initCommand(), t.membersCommand(), t.snapshotCommand(), t.kubectlCommand()} {
		c.GroupID = "cluster"
		root.AddCommand(c)
	}
	for _, c := range []*cobra.Command{t.killCommand(), t.startCommand(), t.stopCommand(), t.pauseCommand(), t.resumeCommand(),
		t.partitionCommand(), t.wipeCommand(), t.logsCommand(), t.execCommand()} {
		c.GroupID = "machine"
		root.AddCommand(c)
	}
	return root
}

func environment(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

// load reads the cluster that the flags name.
func (t *tool) load() (*cluster.Spec, error) { return cluster.Load(t.run) }
