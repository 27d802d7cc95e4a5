package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"timonel/internal/cluster"
	"timonel/pki"
)

func (t *tool) upCommand() *cobra.Command {
	var controllers, agents int
	var subnet, bin, images string
	var sample bool
	o := cluster.Options{}
	cmd := &cobra.Command{
		Use: "up", Short: "Bring the cluster up; what runs already is left alone", Args: cobra.NoArgs,
		Long: `Bring the cluster up: each controller and agent on a machine of its own, made of
Linux namespaces, with its own address. What is there already stays, what does
not run is started, so it may be called again. Needs root.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			begin := time.Now()
			o.Run, o.Name, o.Sample = t.run, t.name, sample
			if cmd.Flags().Changed("controllers") {
				o.Controllers = &controllers
			}
			if cmd.Flags().Changed("agents") {
				o.Agents = &agents
			}
			var err error
			if subnet != "auto" {
				if o.Subnet, err = netip.ParsePrefix(subnet); err != nil {
					return fmt.Errorf("--subnet %q: want `auto` or an IPv4 network such as 10.77.0.0/24", subnet)
				}
			}
			if o.Bin, o.Images, err = programFolders(bin, images); err != nil {
				return err
			}
			shown := &progress{out: cmd.OutOrStdout(), terminal: isTerminal(cmd.OutOrStdout())}
			o.Report = shown
			s, err := cluster.Up(cmd.Context(), o)
			shown.end()
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), `
The cluster is up after %.1f s. Use it with

  export KUBECONFIG=%s     # or: %[3]s kubectl …
  %[3]s kubectl get nodes,pods -o wide
  %[3]s status             # who leads, what is applied
  %[3]s kill c1            # and see that nothing happens
  %[3]s down
`, time.Since(begin).Seconds(), s.Kubeconfig(), commandName(t))
			return nil
		},
	}
	f := cmd.Flags()
	f.IntVar(&controllers, "controllers", 3, "how many controllers: 1, 3 or 5")
	f.IntVar(&agents, "agents", 2, "how many agents; more may be added by calling up again")
	f.StringVar(&subnet, "subnet", "auto", "network of the machines; auto: a free one of 10.77.0.0/16")
	f.StringVar(&bin, "bin", "", "folder of the programs controller, agent and machine (default: where timonel is)")
	f.StringVar(&images, "images", "", "folder of the images that agents import (default: images beside the programs)")
	f.BoolVar(&sample, "sample", true, "deploy the sample application")
	f.BoolVar(&o.Pool, "load-balancer-pool", true, "give Services of type LoadBalancer addresses of the machines' network, unless there are pools")
	f.StringArrayVar(&o.ControllerFlags, "controller-flag", nil, "a further flag for every controller, such as --controller-flag=--log-level=debug")
	f.StringArrayVar(&o.AgentFlags, "agent-flag", nil, "a further flag for every agent")
	return cmd
}

// programFolders makes the folders of programs and images absolute.
func programFolders(bin, images string) (string, string, error) {
	if bin == "" {
		self, err := os.Executable()
		if err != nil {
			return "", "", fmt.Errorf("find the folder of the programs: %w: name it with --bin", err)
		}
		bin = filepath.Dir(self)
	}
	if images == "" {
		images = filepath.Join(bin, "images")
	}
	bin, err := filepath.Abs(bin)
	if err != nil {
		return "", "", err
	}
	images, err = filepath.Abs(images)
	return bin, images, err
}

func isTerminal(out any) bool {
	file, ok := out.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

// commandName is how to call this program again with the same cluster.
func commandName(t *tool) string {
	name := os.Args[0]
	if t.run != "run" && os.Getenv("TIMONEL_RUN") != t.run {
		name += " --run " + t.run
	}
	return name
}

func (t *tool) downCommand() *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "Take the cluster down and delete its data", Args: cobra.NoArgs,
		Long: `Take the cluster down, in whatever state it is, and delete its data: processes,
containers, mounts, namespaces, interfaces, nftables tables, cgroups and files.
What could not be removed is listed, and the exit status is 1.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			begin := time.Now()
			found, err := cluster.Down(cmd.Context(), t.run, t.name)
			if err != nil {
				return err
			}
			if !found {
				fmt.Fprintf(cmd.OutOrStdout(), "There is no cluster in %s.\n", t.run)
				return nil
			}
			fmt.Fprintf(cmd.OutOrStdout(), "The cluster is down, nothing of it is left (%.1f s).\n", time.Since(begin).Seconds())
			return nil
		},
	}
}

func (t *tool) initCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "init", Short: "Make the secrets of a new cluster, for controllers on machines of your own", Args: cobra.NoArgs,
		Long: `Make the secrets of a new cluster in a folder: its CA, service account key,
gossip key and join token. Copy the folder to every controller and start each
with --bundle. 'timonel up' does this by itself.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return fmt.Errorf("--bundle is missing: name the folder to make")
			}
			bundle, err := pki.CreateBundle(dir)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Cluster %s: its secrets are in %s. On the cluster's first day agents join with the token in %s; later `timonel token create` makes others.\n",
				bundle.ClusterID(), dir, filepath.Join(dir, pki.TokenFile))
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "bundle", "", "folder to make")
	return cmd
}
