package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

const gossipKeysPath = "/timonel/v1/gossip/keys"

// rotationLook is how often a rotation that is waited for is looked at.
const rotationLook = time.Second

// gossipPool is what the controllers say of a pool's keys, which are not told.
type gossipPool struct {
	Pool        string         `json:"pool"`
	Generation  int64          `json:"generation"`
	Step        string         `json:"step"`
	Since       time.Time      `json:"since"`
	WaitSeconds int64          `json:"waitSeconds,omitempty"`
	By          string         `json:"by,omitempty"`
	Keys        []gossipKey    `json:"keys"`
	Have        int            `json:"have"`
	Waiting     []gossipMember `json:"waiting"`
	WaitingAll  int            `json:"waitingCount"`
	Away        []gossipMember `json:"away"`
	AwayAll     int            `json:"awayCount"`
}

type gossipKey struct {
	ID    string    `json:"id"`
	Made  time.Time `json:"made,omitzero"`
	Seals time.Time `json:"seals,omitzero"`
}

type gossipMember struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

func (t *tool) gossipCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "gossip", Short: "Show and rotate the keys of gossip", Args: cobra.NoArgs,
		Long: "Show which keys members gossip with, and give all of them new ones. See docs/gossip.md.",
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(t.gossipKeysCommand(), t.gossipRotateCommand())
	return cmd
}

func (t *tool) gossipKeysCommand() *cobra.Command {
	var a access
	var output output
	cmd := &cobra.Command{
		Use: "keys", Short: "Show the keys of gossip by name, and who has them", Args: cobra.NoArgs,
		Long: `Show the keys of both pools of gossip by name, which is a hash, and how many members
have them; of a rotation that is on, its step and who is waited for.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var pools []gossipPool
			if err := a.ask(t, cmd, http.MethodGet, gossipKeysPath, nil, &pools); err != nil {
				return err
			}
			if output.json {
				return printJSON(cmd.OutOrStdout(), pools)
			}
			return printGossipKeys(cmd.OutOrStdout(), pools)
		},
	}
	output.flag(cmd)
	a.flags(cmd)
	return cmd
}

func printGossipKeys(out io.Writer, pools []gossipPool) error {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "POOL\tKEY\tUSE\tMADE\tSEALS SINCE\tHAVE THESE\tWAITED FOR\tAWAY")
	for _, p := range pools {
		for i, k := range p.Keys {
			use, made, seals := "seals and opens", "with the cluster", moment(k.Seals)
			if i > 0 {
				use, seals = "opens", "-"
			}
			if !k.Made.IsZero() {
				made = k.Made.Format(time.RFC3339)
			} else if i == 0 {
				seals = "always"
			}
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%d\t%d\t%d\n", p.Pool, k.ID, use, made, seals, p.Have, p.WaitingAll, p.AwayAll)
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, p := range pools {
		if p.Step != "" {
			fmt.Fprintf(out, "The key of %s is being rotated by %s: step %q since %s.\n", p.Pool, dash(p.By), p.Step, p.Since.Format(time.RFC3339))
		}
		for _, list := range []struct {
			what    string
			members []gossipMember
			all     int
		}{{"is waited for", p.Waiting, p.WaitingAll}, {"is away, and learns the keys when it comes back", p.Away, p.AwayAll}} {
			for _, m := range list.members {
				fmt.Fprintf(out, "! %s: %s %s: it %s\n", p.Pool, m.Name, list.what, m.Why)
			}
			if more := list.all - len(list.members); more > 0 {
				fmt.Fprintf(out, "! %s: and %d more\n", p.Pool, more)
			}
		}
	}
	return nil
}

func (t *tool) gossipRotateCommand() *cobra.Command {
	var a access
	var pools []string
	var wait time.Duration
	var detach bool
	cmd := &cobra.Command{
		Use: "rotate-key", Short: "Give all members new keys of gossip, and have the old ones be worth nothing", Args: cobra.NoArgs,
		Long: `Give all members a new key of gossip. Three steps lose nobody: all take the new key
besides the old, all seal with it, all forget the old one. Each begins when every
member that lives has done the one before, or --wait after it; a member that is away
learns the key when it comes back, from the log or over its stream.

The command waits for the end; interrupted, it leaves the rotation to the leader.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if wait < time.Second {
				return fmt.Errorf("--wait %s: want a second at least", wait)
			}
			var now []gossipPool
			err := a.ask(t, cmd, http.MethodPost, gossipKeysPath, map[string]any{"pools": pools, "waitSeconds": int64(wait / time.Second)}, &now)
			if err != nil {
				return err
			}
			if detach {
				fmt.Fprintf(cmd.OutOrStdout(), "The keys of %s are being rotated: `timonel gossip keys` shows how far it is.\n", strings.Join(pools, " and "))
				return nil
			}
			return a.followRotation(t, cmd, now)
		},
	}
	cmd.Flags().StringSliceVar(&pools, "pool", []string{"controllers", "nodes"}, "whose key: nodes, controllers or both")
	cmd.Flags().DurationVar(&wait, "wait", 10*time.Minute, "how long each step waits for members that live and do not follow, until it goes on without them")
	cmd.Flags().BoolVar(&detach, "detach", false, "do not wait for the end")
	a.flags(cmd)
	return cmd
}

// followRotation says each step, until there is one key of each pool. An API that does
// not answer for a while, as during an election, ends nothing.
func (a *access) followRotation(t *tool, cmd *cobra.Command, began []gossipPool) error {
	begin := map[string]int64{}
	for _, p := range began {
		begin[p.Pool] = p.Generation
	}
	said, silent := map[string]string{}, 0
	ticker := time.NewTicker(rotationLook)
	defer ticker.Stop()
	for now := began; ; {
		left := 0
		for _, p := range now {
			first, ours := begin[p.Pool]
			if !ours {
				continue
			}
			if p.Step != "" {
				left++
			}
			if p.Generation < first {
				return fmt.Errorf("%s: the cluster knows no more of the rotation of %s: it was restored, or an API without it answered; see `timonel gossip keys`", cmd.CommandPath(), p.Pool)
			}
			if text := rotationText(p); said[p.Pool] != text {
				said[p.Pool] = text
				fmt.Fprintln(cmd.OutOrStdout(), text)
			}
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ticker.C:
		case <-cmd.Context().Done():
			return cmd.Context().Err()
		}
		var next []gossipPool
		if err := a.ask(t, cmd, http.MethodGet, gossipKeysPath, nil, &next); err != nil {
			if silent++; silent > 60 {
				return fmt.Errorf("the rotation goes on without this command: %w", err)
			}
			continue
		}
		now, silent = next, 0
	}
}

func rotationText(p gossipPool) string {
	var text string
	switch p.Step {
	case "install":
		text = fmt.Sprintf("%s: all take key %s besides %s; %d members have", p.Pool, p.Keys[len(p.Keys)-1].ID, p.Keys[0].ID, p.Have)
	case "use":
		text = fmt.Sprintf("%s: all seal with key %s; %d members do", p.Pool, p.Keys[0].ID, p.Have)
	default:
		text = fmt.Sprintf("%s: key %s is the only one", p.Pool, p.Keys[0].ID)
		if p.AwayAll > 0 {
			text += fmt.Sprintf("; %d members are away, and learn it when they come back", p.AwayAll)
		}
		return text + "."
	}
	if p.WaitingAll > 0 {
		names := make([]string, 0, len(p.Waiting))
		for _, m := range p.Waiting {
			names = append(names, m.Name)
		}
		text += fmt.Sprintf(", %d do not yet: %s", p.WaitingAll, strings.Join(names, ", "))
	}
	return text
}
