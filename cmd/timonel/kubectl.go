package main

import (
	"os"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/component-base/cli"
	kubectl "k8s.io/kubectl/pkg/cmd"
)

// kubectlCommand is kubectl itself, of the version of the API, with the
// cluster's kubeconfig unless --kubeconfig names another, or KUBECONFIG while
// --run is not given.
func (t *tool) kubectlCommand() *cobra.Command {
	return &cobra.Command{
		Use: "kubectl …", Short: "kubectl, of the right version and for this cluster",
		DisableFlagParsing: true, // all flags are kubectl's
		RunE: func(cmd *cobra.Command, args []string) error {
			if os.Getenv("KUBECONFIG") == "" || cmd.Root().PersistentFlags().Changed("run") {
				s, err := t.load()
				if err != nil {
					return err
				}
				if err := os.Setenv("KUBECONFIG", s.Kubeconfig()); err != nil {
					return err
				}
			}
			os.Args = append([]string{"kubectl"}, args...)
			streams := genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr}
			flags := genericclioptions.NewConfigFlags(true).WithDeprecatedPasswordFlag().
				WithDiscoveryBurst(300).WithDiscoveryQPS(50.0).WithWarningPrinter(streams)
			command := kubectl.NewDefaultKubectlCommandWithArgs(kubectl.KubectlOptions{
				PluginHandler: kubectl.NewDefaultPluginHandler([]string{"kubectl"}),
				Arguments:     os.Args,
				ConfigFlags:   flags,
				IOStreams:     streams,
			})
			command.SilenceUsage = false
			os.Exit(cli.Run(command))
			return nil
		},
	}
}
