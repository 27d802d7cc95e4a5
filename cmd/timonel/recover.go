package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"timonel/backup"
	"timonel/consensus"
)

func membersRecoverCommand() *cobra.Command {
	var dataDir string
	var dryRun, force bool
	cmd := &cobra.Command{
		Use: "recover", Short: "Go on with one controller when the majority is lost for good", Args: cobra.NoArgs,
		Long: `Make one stopped controller the whole cluster, with all the data that it has, when a
majority of the controllers is lost for good. Run it with --dry-run on each one
that is left first, and recover the one with the greatest term, then index. Start
it, and the others with empty data folders: they join it. What only the lost
controllers had is lost. See docs/recovery.md.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dataDir == "" {
				return errors.New("--data-dir is required: that of the stopped controller")
			}
			folder := filepath.Join(dataDir, "raft")
			r, err := backup.Recover(consensus.RecoverConfig{DataDir: folder, DryRun: dryRun, Force: force, Now: time.Now()})
			if err != nil {
				return fmt.Errorf("members recover: %w", err)
			}
			out := cmd.OutOrStdout()
			if r.Finished {
				fmt.Fprintf(out, "%s was recovered already, and is complete now. The folder as it was is %s.\n", folder, r.Kept)
				return nil
			}
			fmt.Fprintf(out, "Controller %s of cluster %s: term %d, index %d, revision %d, %d objects, last written %s.\nIts members:", r.ID, r.ClusterID, r.Term, r.Index, r.Former, r.Keys, r.Written.UTC().Format(time.RFC3339))
			for _, m := range r.Members {
				role := ""
				if !m.Voter {
					role = ", non-voter"
				}
				fmt.Fprintf(out, " %s (%s%s)", m.ID, m.Addr, role)
			}
			fmt.Fprintln(out)
			if dryRun {
				return nil
			}
			fmt.Fprintf(out, `Recovered: %s alone is the cluster now, and revision %d is %d. All that was in
its log counts. What others acknowledged after index %d of term %d is lost.
The folder as it was is %s.
Start %s; remove %s on the others, and start them: they join.
`, r.ID, r.Former, r.Revision, r.Index, r.Term, r.Kept, r.ID, folder)
			return nil
		},
	}
	cmd.Flags().StringVar(&dataDir, "data-dir", "", "the controller's --data-dir")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say what is there")
	cmd.Flags().BoolVar(&force, "force", false, "even if the controller was removed or did not vote")
	return cmd
}
