package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"timonel/backup"
	"timonel/pki"
)

func (t *tool) snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "snapshot", Short: "Save, look at and restore the cluster's state", Args: cobra.NoArgs,
		Long: "Save the cluster's state to a file while it runs, look at such a file, list the\nscheduled ones, and restore one into a new cluster. See docs/backup.md.",
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(t.snapshotSaveCommand(), t.snapshotListCommand(), snapshotInspectCommand(), snapshotRestoreCommand())
	return cmd
}

// access is how a command reaches the API.
type access struct {
	kubeconfig, context, bundle, server string
}

func (a *access) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&a.kubeconfig, "kubeconfig", "", "how to reach the cluster (default: KUBECONFIG, else the one in --run)")
	cmd.Flags().StringVar(&a.context, "context", "", "context of the kubeconfig")
	cmd.Flags().StringVar(&a.bundle, "bundle", "", "instead of a kubeconfig: the folder of the cluster's secrets, on a controller's machine, with --server")
	cmd.Flags().StringVar(&a.server, "server", "", "with --bundle: a controller's API, such as https://10.0.0.1:6443")
}

func (a *access) config(t *tool, cmd *cobra.Command) (*rest.Config, error) {
	if a.bundle != "" || a.server != "" {
		if a.bundle == "" || a.server == "" {
			return nil, errors.New("--bundle and --server go together")
		}
		bundle, err := pki.LoadBundle(a.bundle)
		if err != nil {
			return nil, err
		}
		admin, err := bundle.ClientCert("timonel-admin", []string{pki.AdminGroup})
		if err != nil {
			return nil, err
		}
		return &rest.Config{Host: a.server, TLSClientConfig: rest.TLSClientConfig{CAData: bundle.CA(), CertData: admin.Cert, KeyData: admin.Key, ServerName: "kubernetes"}}, nil
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	switch rules.ExplicitPath = a.kubeconfig; {
	case a.kubeconfig != "":
	case os.Getenv("KUBECONFIG") == "" || cmd.Root().PersistentFlags().Changed("run"):
		s, err := t.load()
		if err != nil {
			return nil, fmt.Errorf("%w; or give --kubeconfig, or --bundle and --server", err)
		}
		rules.ExplicitPath = s.Kubeconfig()
	}
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: a.context}).ClientConfig()
}

// get asks for a path of the API and returns the body of a good answer.
func (a *access) get(ctx context.Context, t *tool, cmd *cobra.Command, path string) (io.ReadCloser, error) {
	return a.do(ctx, t, cmd, http.MethodGet, path, nil)
}

// do sends a request with a JSON body, if any, and returns the body of a good
// answer.
func (a *access) do(ctx context.Context, t *tool, cmd *cobra.Command, method, path string, send io.Reader) (io.ReadCloser, error) {
	config, err := a.config(t, cmd)
	if err != nil {
		return nil, err
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, method, base.JoinPath(path).String(), send)
	if err != nil {
		return nil, err
	}
	if send != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode == http.StatusOK {
		return response.Body, nil
	}
	defer response.Body.Close()
	said, _ := io.ReadAll(io.LimitReader(response.Body, 64<<10))
	var status metav1.Status
	if json.Unmarshal(said, &status) == nil && status.Message != "" {
		return nil, errors.New(status.Message)
	}
	return nil, fmt.Errorf("%s answers %s: %s", base, response.Status, strings.TrimSpace(string(said)))
}

func (t *tool) snapshotSaveCommand() *cobra.Command {
	var a access
	cmd := &cobra.Command{
		Use: "save FILE", Short: "Save the cluster's state to a file, while it runs", Args: needFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			body, err := a.get(cmd.Context(), t, cmd, "/timonel/v1/snapshot")
			if err != nil {
				return fmt.Errorf("save a snapshot: %w", err)
			}
			defer body.Close()
			if err := backup.WriteFile(args[0], func(w io.Writer) error {
				_, err := io.Copy(w, body)
				return err
			}); err != nil {
				return fmt.Errorf("save a snapshot: %w", err)
			}
			info, err := inspectFile(cmd.Context(), args[0], backup.S3Config{})
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "Saved %s: revision %d of cluster %s, %d objects, %d bytes, verified.\n", args[0], info.Revision, info.ClusterID, info.Keys, info.Size)
			return nil
		},
	}
	a.flags(cmd)
	return cmd
}

func needFile(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("name one file: %s FILE", cmd.CommandPath())
	}
	return nil
}

// open opens a snapshot file on disk or at an s3:// URL.
func open(ctx context.Context, file string, s3 backup.S3Config) (*backup.Reader, io.Closer, error) {
	if !strings.HasPrefix(file, "s3://") {
		f, err := backup.Open(file)
		if err != nil {
			return nil, nil, err
		}
		return f.Reader, f, nil
	}
	object, err := backup.OpenS3(ctx, file, s3)
	if err != nil {
		return nil, nil, err
	}
	r, err := backup.NewReader(object, file)
	if err != nil {
		object.Close()
		return nil, nil, err
	}
	return r, object, nil
}

func inspectFile(ctx context.Context, file string, s3 backup.S3Config) (backup.Info, error) {
	r, closer, err := open(ctx, file, s3)
	if err != nil {
		return backup.Info{}, err
	}
	defer closer.Close()
	return backup.Inspect(r)
}

func snapshotInspectCommand() *cobra.Command {
	var output output
	var s3 backup.S3Config
	cmd := &cobra.Command{
		Use: "inspect FILE", Short: "Verify a snapshot file and show what is in it", Args: needFile,
		Long: "Verify a snapshot file, or an object s3://bucket/key, and show what is in it.",
		RunE: func(cmd *cobra.Command, args []string) error {
			info, err := inspectFile(cmd.Context(), args[0], s3)
			if err != nil {
				return err
			}
			if output.json {
				return printJSON(cmd.OutOrStdout(), info)
			}
			table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintf(table, "Cluster\t%s\nTaken\t%s by Timonel %s\nRevision\t%d, history from %d\nLog\tindex %d, term %d\nHash\t%s\nSize\t%d bytes\nSHA-256\t%s\n\nRESOURCE\tOBJECTS\tBYTES\n",
				info.ClusterID, info.Time.Format(time.RFC3339), info.Version, info.Revision, info.CompactRevision, info.Index, info.Term, info.Hash, info.Size, info.SHA256)
			var bytes int64
			for _, r := range info.Resources {
				fmt.Fprintf(table, "%s\t%d\t%d\n", r.Name, r.Objects, r.Bytes)
				bytes += r.Bytes
			}
			fmt.Fprintf(table, "total\t%d\t%d\n", info.Keys, bytes)
			return table.Flush()
		},
	}
	output.flag(cmd)
	s3.Flags(cmd.Flags(), "s3-")
	return cmd
}

func (t *tool) snapshotListCommand() *cobra.Command {
	var a access
	var output output
	cmd := &cobra.Command{
		Use: "list", Short: "List the scheduled snapshots that are kept", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			body, err := a.get(ctx, t, cmd, "/timonel/v1/snapshots")
			if err != nil {
				return fmt.Errorf("list snapshots: %w", err)
			}
			defer body.Close()
			var list backup.List
			if err := json.NewDecoder(body).Decode(&list); err != nil {
				return fmt.Errorf("list snapshots: %w", err)
			}
			if output.json {
				return printJSON(cmd.OutOrStdout(), list)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s, as %s sees it: every %s, %d are kept.\n", list.Store, list.Controller, list.Interval, list.Retain)
			table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(table, "NAME\tTAKEN\tREVISION\tBYTES")
			for _, item := range list.Items {
				fmt.Fprintf(table, "%s\t%s\t%d\t%d\n", item.Name, item.Time.Format(time.RFC3339), item.Revision, item.Size)
			}
			if list.Problem != "" {
				defer fmt.Fprintf(cmd.OutOrStdout(), "! %s\n", list.Problem)
			}
			return table.Flush()
		},
	}
	output.flag(cmd)
	a.flags(cmd)
	return cmd
}

func snapshotRestoreCommand() *cobra.Command {
	var dataDir, bundleDir, name, address, logStore string
	var bump int64
	var s3 backup.S3Config
	cmd := &cobra.Command{
		Use: "restore FILE", Short: "Make the data folder of a new cluster from a snapshot file", Args: needFile,
		Long: `Make the data folder of the first controller of a new cluster from a snapshot
file, or an object s3://bucket/key. Start that controller on it, and the others
with empty folders: they join it. Controllers of the former cluster must not run
any more, and their folders must be removed. A folder with data is refused.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			for flag, value := range map[string]string{"--data-dir": dataDir, "--bundle": bundleDir, "--name": name} {
				if value == "" {
					return fmt.Errorf("%s is required: the same as the controller's that is to start from it", flag)
				}
			}
			if _, _, err := net.SplitHostPort(address); err != nil {
				return fmt.Errorf("--raft-address %q is not host:port", address)
			}
			if bump < 0 {
				return fmt.Errorf("--bump-revision %d: revisions can only be raised", bump)
			}
			bundle, err := pki.LoadBundle(bundleDir)
			if err != nil {
				return err
			}
			r, closer, err := open(cmd.Context(), args[0], s3)
			if err != nil {
				return err
			}
			defer closer.Close()
			folder := filepath.Join(dataDir, "raft")
			restored, err := backup.Restore(r, backup.Target{
				DataDir: folder, ClusterID: bundle.ClusterID(), Name: name, Address: address, LogStore: logStore, Now: time.Now(), Bump: bump,
			})
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			fmt.Fprintf(out, "Restored %d objects of %s into %s: revision %d is %d now.\n", restored.Keys, restored.Time.Format(time.RFC3339), folder, restored.Header.Revision, restored.Revision)
			if restored.ClusterID != bundle.ClusterID() {
				fmt.Fprintf(out, "The snapshot is of cluster %s and the bundle of %s: agents have to join anew, and tokens of service accounts are issued anew.\n", restored.ClusterID, bundle.ClusterID())
			}
			fmt.Fprintf(out, "Start controller %s on it; start the others with empty data folders.\n", name)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&dataDir, "data-dir", "", "the controller's --data-dir")
	f.StringVar(&bundleDir, "bundle", "", "the controller's --bundle")
	f.StringVar(&name, "name", "", "the controller's --name")
	f.StringVar(&address, "raft-address", "127.0.0.1:7444", "address to record until the controller leads and records its own")
	f.StringVar(&logStore, "log-store", "boltdb", "the controller's --log-store: boltdb or wal")
	f.Int64Var(&bump, "bump-revision", 0, "what to raise every revision by (default: up to the clock's microseconds)")
	s3.Flags(f, "s3-")
	return cmd
}
