package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"timonel/consensus"
)

const membersPath = "/timonel/v1/members"

func (t *tool) membersCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "members", Short: "List, add, replace and remove the controllers that keep the log", Args: cobra.NoArgs,
		Long: "List the controllers that keep the cluster's log, and change which they are. See\ndocs/members.md; docs/recovery.md is for when a majority of them is lost.",
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(t.membersListCommand(), t.membersAddCommand(), t.membersPromoteCommand(), t.membersRemoveCommand(),
		t.membersReplaceCommand(), t.membersTransferCommand(), membersRecoverCommand())
	return cmd
}

func (a *access) members(ctx context.Context, t *tool, cmd *cobra.Command) (list consensus.MemberList, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	body, err := a.get(ctx, t, cmd, membersPath)
	if err != nil {
		return list, fmt.Errorf("list members: %w", err)
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(&list); err != nil {
		return list, fmt.Errorf("list members: %w", err)
	}
	return list, nil
}

// memberChange is the body of a change.
type memberChange struct {
	ID      string `json:"id"`
	Address string `json:"address,omitempty"`
	Force   bool   `json:"force,omitempty"`
}

// change asks for one change of the members and prints what was done.
func (a *access) change(t *tool, cmd *cobra.Command, path string, c memberChange) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
	defer cancel()
	content, err := json.Marshal(c)
	if err != nil {
		return err
	}
	body, err := a.do(ctx, t, cmd, http.MethodPost, membersPath+"/"+path, bytes.NewReader(content))
	if err != nil {
		return fmt.Errorf("members %s: %w", path, err)
	}
	defer body.Close()
	var answer struct {
		Done string `json:"done"`
	}
	if err := json.NewDecoder(body).Decode(&answer); err != nil {
		return fmt.Errorf("members %s: %w", path, err)
	}
	fmt.Fprintln(cmd.OutOrStdout(), answer.Done)
	return nil
}

func (t *tool) membersListCommand() *cobra.Command {
	var a access
	var output output
	cmd := &cobra.Command{
		Use: "list", Short: "List the members as the leader sees them", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := a.members(cmd.Context(), t, cmd)
			if err != nil {
				return err
			}
			if output.json {
				return printJSON(cmd.OutOrStdout(), list)
			}
			return printMemberList(cmd.OutOrStdout(), list)
		},
	}
	output.flag(cmd)
	a.flags(cmd)
	return cmd
}

func printMemberList(out io.Writer, l consensus.MemberList) error {
	if l.Leader != "" {
		fmt.Fprintf(out, "%s leads in term %d. %d voters are healthy, %d are needed.\n", l.Leader, l.Term, l.Healthy, l.Quorum)
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "NAME\tADDRESS\tROLE\tHEALTHY\tAPPLIED\tLAG\tLAST CONTACT\tVERSION\tMAY BE REMOVED")
	for _, m := range l.Members {
		healthy, removable, contact := "yes", "yes", "-"
		if !m.Healthy {
			healthy = "no"
		}
		if !m.Removable {
			removable = "no"
		}
		switch {
		case m.Role == "leader":
		case m.LastContact < 0:
			contact = "never"
		default:
			contact = (time.Duration(m.LastContact) * time.Microsecond).Round(time.Millisecond).String() + " ago"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n", m.ID, m.Address, m.Role, healthy, m.AppliedIndex, m.Lag, contact, dash(m.Version), removable)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, m := range l.Members {
		if m.Problem != "" {
			fmt.Fprintf(out, "! %s: %s\n", m.ID, m.Problem)
		}
	}
	for _, p := range l.Problems {
		fmt.Fprintf(out, "! %s\n", p)
	}
	return nil
}

// memberArgs takes between least and most arguments, and says what they are.
func memberArgs(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < least || len(args) > most {
			return fmt.Errorf("want: timonel members %s", cmd.Use)
		}
		return nil
	}
}

func (t *tool) membersAddCommand() *cobra.Command {
	var a access
	cmd := &cobra.Command{
		Use: "add NAME [ADDRESS]", Short: "Let a controller in as a non-voter; it votes when it has caught up", Args: memberArgs(1, 2),
		Long: `Let a controller in as a non-voter, which votes when it has caught up. A controller
that starts with an empty data folder and finds the cluster by gossip asks for it
by itself; this is for one that has data, because it was removed, or that is to
be known before it starts. ADDRESS is the host:port of its Raft listener, by
default where gossip sees it.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c := memberChange{ID: args[0]}
			if len(args) == 2 {
				c.Address = args[1]
			}
			return a.change(t, cmd, "add", c)
		},
	}
	a.flags(cmd)
	return cmd
}

func (t *tool) membersPromoteCommand() *cobra.Command {
	var a access
	var force bool
	cmd := &cobra.Command{
		Use: "promote NAME", Short: "Make a non-voter vote now, if it has caught up", Args: memberArgs(1, 1),
		Long: "Make a non-voter vote now. The leader does so by itself when it has been caught up\nfor a while; one that has not caught up is refused.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.change(t, cmd, "promote", memberChange{ID: args[0], Force: force})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "even if it does not answer or has not caught up: it counts for the quorum at once, and writes stop if it is missing there")
	a.flags(cmd)
	return cmd
}

func (t *tool) membersRemoveCommand() *cobra.Command {
	var a access
	var force bool
	cmd := &cobra.Command{
		Use: "remove NAME", Short: "Remove a controller from the members", Args: memberArgs(1, 1),
		Long: `Remove a controller from the members. It is refused when the voters left would not
have a healthy majority. A leader hands over first. A removed controller that
still runs serves nothing; it comes back with an empty data folder, or by
"timonel members add".`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.change(t, cmd, "remove", memberChange{ID: args[0], Force: force})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "even if the voters left have no healthy majority: no write is possible until enough of them are back")
	a.flags(cmd)
	return cmd
}

func (t *tool) membersTransferCommand() *cobra.Command {
	var a access
	cmd := &cobra.Command{
		Use: "transfer-leader [NAME]", Short: "Make another controller lead", Args: memberArgs(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.change(t, cmd, "transfer-leader", memberChange{ID: strings.Join(args, "")})
		},
	}
	a.flags(cmd)
	return cmd
}

func (t *tool) membersReplaceCommand() *cobra.Command {
	var a access
	var timeout time.Duration
	var force bool
	cmd := &cobra.Command{
		Use: "replace OLD NEW [ADDRESS]", Short: "Let a controller in, and remove another when it votes", Args: memberArgs(2, 3),
		Long: `Wait until NEW, a controller that was started with an empty data folder, has joined
and votes, then remove OLD. In this order the cluster never has less voters than
before. Run it again when it was interrupted: it goes on where it is. ADDRESS is
the host:port of NEW's Raft listener, for one that does not join by itself.
A controller that comes back under its own name with an empty data folder needs
no command.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), timeout, fmt.Errorf("not within %s: run the command again to go on", timeout))
			defer cancel()
			return a.replace(ctx, t, cmd, args, force)
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Minute, "how long to wait until NEW votes")
	cmd.Flags().BoolVar(&force, "force", false, "remove OLD even if the voters left have no healthy majority")
	a.flags(cmd)
	return cmd
}

func (a *access) replace(ctx context.Context, t *tool, cmd *cobra.Command, args []string, force bool) error {
	out := cmd.OutOrStdout()
	old, replacement := args[0], args[1]
	if old == replacement {
		return fmt.Errorf("%s cannot replace itself: start it with an empty data folder, and it comes back by itself", old)
	}
	said := ""
	say := func(format string, args ...any) {
		if s := fmt.Sprintf(format, args...); s != said {
			said = s
			fmt.Fprintln(out, s)
		}
	}
	ticker := time.NewTicker(250 * time.Millisecond)
	defer ticker.Stop()
	for first := true; ; first = false {
		list, err := a.members(ctx, t, cmd)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err == nil && list.Leader == "" {
			err = errors.New(strings.Join(list.Problems, "; "))
		}
		if err != nil {
			return err
		}
		var was, is *consensus.MemberInfo
		for i := range list.Members {
			switch m := &list.Members[i]; m.ID {
			case old:
				was = m
			case replacement:
				is = m
			}
		}
		switch {
		case was == nil && (is == nil || first && is.Role == "non-voter"):
			return fmt.Errorf("%s is not a member: see `timonel members list`", old)
		case is != nil && is.Role != "non-voter" && is.Healthy:
			say("%s votes.", replacement)
			if was == nil {
				say("%s is not a member.", old)
				return nil
			}
			return a.change(t, cmd, "remove", memberChange{ID: old, Force: force})
		case is == nil && first && len(args) == 3:
			if err := a.change(t, cmd, "add", memberChange{ID: replacement, Address: args[2]}); err != nil {
				return err
			}
		case is == nil:
			say("%s is not there yet: start it with an empty data folder.", replacement)
		case !is.Healthy:
			say("%s has joined and is not healthy: %s", replacement, is.Problem)
		default:
			say("%s has joined and catches up.", replacement)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
