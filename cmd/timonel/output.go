package main

import (
	"encoding/json"
	"errors"
	"io"

	"github.com/spf13/cobra"
)

// output is how a command prints what it shows: as a table for people, or as JSON. It is
// the value of the flag that says so, [pflag.Value].
type output struct{ json bool }

func (o *output) flag(cmd *cobra.Command) {
	cmd.Flags().VarP(o, "output", "o", "table or json")
}

func (o *output) Set(text string) error {
	if text != "table" && text != "json" {
		return errors.New("want table or json")
	}
	o.json = text == "json"
	return nil
}

func (o *output) String() string {
	if o.json {
		return "json"
	}
	return "table"
}

func (o *output) Type() string { return "string" }

func printJSON(out io.Writer, value any) error {
	encoder := json.NewEncoder(out)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}
