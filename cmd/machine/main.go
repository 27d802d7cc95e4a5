// Command machine is what `timonel up` runs beside controllers and agents on a
// test machine of its own making: process 1 of each machine, and the load
// balancer in front of the API. It is small so that neither costs anything.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"timonel/internal/machines"
	"timonel/internal/proxy"
)

func main() {
	if err := command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "machine:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{Use: "machine", Short: "Parts of the machines that timonel up makes",
		SilenceErrors: true, SilenceUsage: true}
	root.AddCommand(initCommand(), proxyCommand())
	return root
}

func initCommand() *cobra.Command {
	process := machines.Init{Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	cmd := &cobra.Command{Use: "init", Short: "Be process 1 of a machine", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !filepath.IsAbs(process.Dir) {
				return fmt.Errorf("--dir %q: give the machine's folder as an absolute path", process.Dir)
			}
			return process.Run(context.Background())
		}}
	cmd.Flags().StringVar(&process.Dir, "dir", "", "the machine's folder")
	cmd.Flags().StringVar(&process.Hostname, "hostname", "", "the machine's host name")
	return cmd
}

func proxyCommand() *cobra.Command {
	config := proxy.Config{Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	cmd := &cobra.Command{Use: "proxy", Short: "Forward connections to a controller that is ready", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
			defer stop()
			return proxy.Run(ctx, config)
		}}
	cmd.Flags().StringVar(&config.Listen, "listen", "", "address to listen on, host:port")
	cmd.Flags().StringSliceVar(&config.Backends, "backend", nil, "address of a controller's API, host:port; give one for each")
	cmd.Flags().StringVar(&config.CAFile, "ca", "", "the cluster's CA certificate")
	cmd.Flags().StringVar(&config.ServerName, "server-name", "kubernetes", "name that the controllers' certificates are for")
	return cmd
}
