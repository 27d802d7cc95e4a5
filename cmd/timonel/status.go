package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"timonel/internal/cluster"
)

func (t *tool) statusCommand() *cobra.Command {
	var output output
	cmd := &cobra.Command{
		Use: "status", Short: "Show who leads, what is applied, members, nodes and pods", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := t.load()
			if err != nil {
				return err
			}
			status, err := s.Status(cmd.Context())
			if err != nil {
				return err
			}
			if output.json {
				return printJSON(cmd.OutOrStdout(), status)
			}
			return printStatus(cmd.OutOrStdout(), status, time.Now())
		},
	}
	output.flag(cmd)
	return cmd
}

func printStatus(out io.Writer, s *cluster.Status, now time.Time) error {
	leader := s.Leader
	if leader == "" {
		leader = "nobody"
	}
	fmt.Fprintf(out, "Cluster %s (version %d): %s leads in term %d. %d pods, %d ready", s.Cluster, s.Version, leader, s.Term, s.Pods.Total, s.Pods.Ready)
	if s.Pods.Pending > 0 {
		fmt.Fprintf(out, ", %d pending", s.Pods.Pending)
	}
	if s.Pods.Failed > 0 {
		fmt.Fprintf(out, ", %d failed", s.Pods.Failed)
	}
	fmt.Fprintf(out, ".\nAPI %s, kubeconfig %s\n\n", s.API, s.Kubeconfig)

	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "CONTROLLER\tADDRESS\tSTATE\tROLE\tTERM\tAPPLIED\tREVISION\tAGENTS\tMEMORY\tFSYNC\tFOR")
	for _, c := range s.Controllers {
		role, term, applied, revision, agents, fsync := "-", "-", "-", "-", "-", "-"
		if c.Answers {
			role, term, revision = c.Role, fmt.Sprint(c.Term), fmt.Sprint(c.Revision)
			applied = fmt.Sprint(c.AppliedIndex)
			if behind := c.CommitIndex - c.AppliedIndex; c.CommitIndex > c.AppliedIndex {
				applied += fmt.Sprintf(" (-%d)", behind)
			}
			if fsync = "-"; c.Fsync > 0 {
				fsync = c.Fsync.Round(10 * time.Microsecond).String()
			}
			if len(c.Agents) > 0 {
				agents = strings.Join(c.Agents, ",")
			}
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", c.Name, c.Address, state(c.MachineStatus),
			role, term, applied, revision, agents, memory(c.Memory.Resident), fsync, since(c.Started, c.State, now))
	}
	fmt.Fprintln(table)
	if err := table.Flush(); err != nil {
		return err
	}
	if len(s.Nodes) > 0 {
		fmt.Fprintln(table, "NODE\tADDRESS\tSTATE\tREADY\tPODS\tPOD NETWORK\tSTREAM TO\tVERSION\tFOR")
		for _, n := range s.Nodes {
			ready := "yes"
			if !n.Ready {
				ready = "no: " + strings.SplitN(n.Reason, ":", 2)[0]
			}
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n", n.Name, dash(n.Address), state(n.MachineStatus), ready,
				n.Pods, dash(n.PodCIDR), dash(n.StreamTo), dash(n.Version), since(n.Started, n.State, now))
		}
		fmt.Fprintln(table)
		if err := table.Flush(); err != nil {
			return err
		}
	}
	if len(s.Expiries) > 0 {
		fmt.Fprintln(table, "EXPIRES\tIN\tWHAT")
		for _, e := range s.Expiries {
			in := "expired"
			if left := e.At.Sub(now); left > 0 {
				in = cluster.Days(left)
			}
			fmt.Fprintf(table, "%s\t%s\t%s\n", e.At.Format(time.RFC3339), in, e.What)
		}
		fmt.Fprintln(table)
		if err := table.Flush(); err != nil {
			return err
		}
	}
	printMembers(out, s)
	if len(s.Cuts) > 0 {
		fmt.Fprintf(out, "Cut links: %s\n", strings.Join(s.Cuts, ", "))
	}
	for _, problem := range s.Problems {
		fmt.Fprintf(out, "! %s\n", problem)
	}
	return nil
}

// printMembers shows the gossip pool as the leader sees it, on one line when all
// is well.
func printMembers(out io.Writer, s *cluster.Status) {
	for _, c := range s.Controllers {
		if c.Name != s.Leader && (s.Leader != "" || !c.Answers) {
			continue
		}
		var members []string
		for _, m := range c.Members {
			members = append(members, m.Name+" "+m.State)
		}
		if len(members) > 0 {
			fmt.Fprintf(out, "Gossip, as %s sees it: %s\n", c.Name, strings.Join(members, ", "))
		}
		return
	}
}

func state(m cluster.MachineStatus) string {
	if m.Exited != "" && m.State != "running" {
		return m.State + " (" + m.Exited + ")"
	}
	return m.State
}

func memory(bytes int64) string {
	if bytes == 0 {
		return "-"
	}
	return fmt.Sprintf("%d MB", bytes>>20)
}

func since(started time.Time, state string, now time.Time) string {
	if started.IsZero() || state != "running" && state != "paused" {
		return "-"
	}
	return now.Sub(started).Round(time.Second).String()
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
