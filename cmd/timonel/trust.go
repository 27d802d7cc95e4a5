package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

const (
	tokensPath = "/timonel/v1/tokens"
	nodesPath  = "/timonel/v1/nodes"
)

// joinToken is what the controllers say of a token; the text of a new one alone.
type joinToken struct {
	ID          string    `json:"id"`
	Names       []string  `json:"names"`
	Uses        int       `json:"uses"`
	Used        int       `json:"used"`
	Description string    `json:"description"`
	Created     time.Time `json:"created"`
	Expires     time.Time `json:"expires"`
	By          string    `json:"by"`
	Text        string    `json:"text,omitempty"`
}

// boundNode is what the controllers say of a node's name.
type boundNode struct {
	Name    string    `json:"name"`
	Key     string    `json:"key"`
	Bound   time.Time `json:"bound"`
	Token   string    `json:"token"`
	Expires time.Time `json:"expires"`
	Revoked time.Time `json:"revoked"`
	Reset   time.Time `json:"reset"`
	By      string    `json:"by"`
	Reason  string    `json:"reason"`
}

// ask sends and receives JSON.
func (a *access) ask(t *tool, cmd *cobra.Command, method, path string, send, answer any) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), 30*time.Second)
	defer cancel()
	content, err := json.Marshal(send)
	if err != nil {
		return err
	}
	body, err := a.do(ctx, t, cmd, method, path, bytes.NewReader(content))
	if err != nil {
		return fmt.Errorf("%s: %w", cmd.CommandPath(), err)
	}
	defer body.Close()
	return json.NewDecoder(body).Decode(answer)
}

func oneArgument(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 || args[0] == "" || strings.ContainsAny(args[0], "/?#%") {
			return fmt.Errorf("want: %s %s", cmd.CommandPath(), what)
		}
		return nil
	}
}

func (t *tool) tokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "token", Short: "Make, list and revoke the tokens that agents join with", Args: cobra.NoArgs,
		Long: "Make, list and revoke the tokens that agents join with. See docs/trust.md.",
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(t.tokenCreateCommand(), t.tokenListCommand(), t.tokenRevokeCommand())
	return cmd
}

func (t *tool) tokenCreateCommand() *cobra.Command {
	var a access
	var ttl time.Duration
	var uses int
	var names []string
	var description string
	cmd := &cobra.Command{
		Use: "create", Short: "Make a token and print it; it is shown this once", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ttl < time.Second {
				return fmt.Errorf("--ttl %s: want a second at least", ttl)
			}
			var token joinToken
			err := a.ask(t, cmd, http.MethodPost, tokensPath, map[string]any{
				"ttlSeconds": int64(ttl / time.Second), "uses": uses, "names": names, "description": description,
			}, &token)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "Token %s is good until %s.\n", token.ID, token.Expires.Format(time.RFC3339))
			fmt.Fprintln(cmd.OutOrStdout(), token.Text)
			return nil
		},
	}
	f := cmd.Flags()
	f.DurationVar(&ttl, "ttl", 24*time.Hour, "how long it is good")
	f.IntVar(&uses, "uses", 0, "how many nodes may join with it (0: any number)")
	f.StringSliceVar(&names, "names", nil, "the only nodes that may join with it (default: any)")
	f.StringVar(&description, "description", "", "what it is for, as the list shows")
	a.flags(cmd)
	return cmd
}

func (t *tool) tokenListCommand() *cobra.Command {
	var a access
	var output output
	cmd := &cobra.Command{
		Use: "list", Short: "List the tokens that are good; their secrets are not kept", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var list []joinToken
			if err := a.ask(t, cmd, http.MethodGet, tokensPath, nil, &list); err != nil {
				return err
			}
			if output.json {
				return printJSON(cmd.OutOrStdout(), list)
			}
			table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(table, "ID\tEXPIRES\tUSED\tFOR NODES\tMADE BY\tDESCRIPTION")
			for _, k := range list {
				used, nodes := fmt.Sprint(k.Used), "any"
				if k.Uses > 0 {
					used += fmt.Sprintf(" of %d", k.Uses)
				}
				if len(k.Names) > 0 {
					nodes = strings.Join(k.Names, ",")
				}
				fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", k.ID, k.Expires.Format(time.RFC3339), used, nodes, dash(k.By), dash(k.Description))
			}
			return table.Flush()
		},
	}
	output.flag(cmd)
	a.flags(cmd)
	return cmd
}

func (t *tool) tokenRevokeCommand() *cobra.Command {
	var a access
	cmd := &cobra.Command{
		Use: "revoke ID", Short: "Revoke a token: nobody joins with it any more", Args: oneArgument("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var answer struct {
				Done string `json:"done"`
			}
			if err := a.ask(t, cmd, http.MethodDelete, tokensPath+"/"+args[0], nil, &answer); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), answer.Done)
			return nil
		},
	}
	a.flags(cmd)
	return cmd
}

func (t *tool) nodeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "node", Short: "List what nodes' names are bound to, revoke and reset them", Args: cobra.NoArgs,
		Long: "List which keys nodes' names are bound to, take back a node's certificates, and let\na machine that was built anew join under its name. See docs/trust.md.",
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(t.nodeListCommand(),
		t.nodeChangeCommand("revoke", "Take back all that a node of this name was given", `Take back the certificates and tokens that a node was given: its stream, tunnels and
watches end, and nothing is answered to it by any controller. Its Node and pods stay:
delete them, or drain the node, as you see fit. The name is of no use until it is
reset.`),
		t.nodeChangeCommand("reset", "Let a machine that was built anew join under this name", `Forget the key that a node's name is bound to, and revoke it: the next machine that
joins under this name with a good token gets it. It ends a revocation too.`))
	return cmd
}

func (t *tool) nodeListCommand() *cobra.Command {
	var a access
	var output output
	cmd := &cobra.Command{
		Use: "list", Short: "List what nodes' names are bound to", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var list []boundNode
			if err := a.ask(t, cmd, http.MethodGet, nodesPath, nil, &list); err != nil {
				return err
			}
			if output.json {
				return printJSON(cmd.OutOrStdout(), list)
			}
			table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(table, "NODE\tSTATE\tKEY\tBOUND\tCERTIFICATE EXPIRES\tTOKEN\tREASON")
			for _, n := range list {
				state := "bound"
				switch {
				case !n.Revoked.IsZero():
					state = "revoked " + n.Revoked.Format(time.RFC3339)
				case n.Key == "":
					state = "reset " + n.Reset.Format(time.RFC3339)
				}
				fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", n.Name, state, dash(n.Key[:min(12, len(n.Key))]),
					moment(n.Bound), moment(n.Expires), dash(n.Token), dash(n.Reason))
			}
			return table.Flush()
		},
	}
	output.flag(cmd)
	a.flags(cmd)
	return cmd
}

func (t *tool) nodeChangeCommand(verb, short, long string) *cobra.Command {
	var a access
	var reason string
	cmd := &cobra.Command{
		Use: verb + " NAME", Short: short, Long: long, Args: oneArgument("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var node boundNode
			if err := a.ask(t, cmd, http.MethodPost, nodesPath+"/"+args[0]+"/"+verb, map[string]string{"reason": reason}, &node); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "node %s: %s is done\n", args[0], verb)
			if verb == "revoke" {
				fmt.Fprintln(cmd.OutOrStdout(), "It knows the nodes' gossip key: `timonel gossip rotate-key --pool nodes` gives all others a new one.")
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the record")
	a.flags(cmd)
	return cmd
}

func moment(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Format(time.RFC3339)
}
