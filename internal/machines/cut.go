package machines

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"sigs.k8s.io/knftables"
)

// HostName is the host's name in [Network.Cut] and in [Network.Cuts].
const HostName = "host"

// tableName is the name of both of the network's nftables tables: of the ip
// family for the way out, of the bridge family for cuts.
func (n Network) tableName() string { return "timonel-" + n.Name }

func (n Network) bridgeTable() (knftables.Interface, error) {
	return nftables(knftables.BridgeFamily, n.tableName())
}

func nftables(family knftables.Family, table string) (knftables.Interface, error) {
	nft, err := knftables.New(family, table, knftables.EmulateDestroy)
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	return nft, nil
}

// createTables makes the rules that let machines reach out through the host
// and, empty, the sets of links that are cut.
func (n Network) createTables() error {
	out, err := nftables(knftables.IPv4Family, n.tableName())
	if err != nil {
		return err
	}
	tx := out.NewTransaction()
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("Timonel test machines: the way out")})
	tx.Add(&knftables.Chain{Name: "out", Type: knftables.PtrTo(knftables.NATType),
		Hook: knftables.PtrTo(knftables.PostroutingHook), Priority: knftables.PtrTo(knftables.SNATPriority)})
	tx.Flush(&knftables.Chain{Name: "out"})
	tx.Add(&knftables.Rule{Chain: "out", Rule: knftables.Concat(
		"ip saddr", n.Prefix.Masked().String(), "ip daddr !=", n.Prefix.Masked().String(), "oifname !=", n.Bridge(), "masquerade")})
	if err := out.Run(context.Background(), tx); err != nil {
		return fmt.Errorf("create nftables table ip %s: %w", n.tableName(), err)
	}

	cuts, err := n.bridgeTable()
	if err != nil {
		return err
	}
	tx = cuts.NewTransaction()
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("Timonel test machines: links that are cut")})
	tx.Add(&knftables.Set{Name: "between", TypeOf: "iifname . oifname"})
	tx.Add(&knftables.Set{Name: "to-host", TypeOf: "iifname"})
	tx.Add(&knftables.Set{Name: "from-host", TypeOf: "oifname"})
	for _, chain := range []struct {
		hook knftables.BaseChainHook
		rule string
	}{
		{knftables.ForwardHook, "iifname . oifname @between drop"},
		{knftables.InputHook, "iifname @to-host drop"},
		{knftables.OutputHook, "oifname @from-host drop"},
	} {
		name := string(chain.hook)
		tx.Add(&knftables.Chain{Name: name, Type: knftables.PtrTo(knftables.FilterType),
			Hook: knftables.PtrTo(chain.hook), Priority: knftables.PtrTo(knftables.BaseChainPriority("0"))})
		tx.Flush(&knftables.Chain{Name: name})
		tx.Add(&knftables.Rule{Chain: name, Rule: chain.rule})
	}
	if err := cuts.Run(context.Background(), tx); err != nil {
		return fmt.Errorf("create nftables table bridge %s: %w", n.tableName(), err)
	}
	return nil
}

func (n Network) deleteTables() error {
	var failed []error
	for _, family := range []knftables.Family{knftables.IPv4Family, knftables.BridgeFamily} {
		nft, err := nftables(family, n.tableName())
		if err != nil {
			return err
		}
		tx := nft.NewTransaction()
		tx.Destroy(&knftables.Table{})
		if err := nft.Run(context.Background(), tx); err != nil && !knftables.IsNotFound(err) {
			failed = append(failed, fmt.Errorf("delete nftables table %s %s: %w", family, n.tableName(), err))
		}
	}
	return errors.Join(failed...)
}

func (n Network) leftoverTables() []string {
	var left []string
	for _, family := range []knftables.Family{knftables.IPv4Family, knftables.BridgeFamily} {
		nft, err := nftables(family, n.tableName())
		if err != nil {
			continue
		}
		if _, err := nft.List(context.Background(), "chains"); err == nil {
			left = append(left, fmt.Sprintf("nftables table %s %s", family, n.tableName()))
		}
	}
	return left
}

// Direction says which packets of a machine a cut drops.
type Direction string

// The directions of a cut, seen from the machine that is cut off.
const (
	Both Direction = "both"
	In   Direction = "in"  // what others send it
	Out  Direction = "out" // what it sends others
)

// Cut drops all packets between a machine and each of the others. HostName as
// one of the others is the host with everything behind it.
func (n Network) Cut(machine string, others []string, direction Direction) error {
	return n.changeCuts(machine, others, direction, func(tx *knftables.Transaction, e *knftables.Element) { tx.Add(e) })
}

// Heal ends all cuts of a machine.
func (n Network) Heal(machine string) error {
	nft, err := n.bridgeTable()
	if err != nil {
		return err
	}
	tx := nft.NewTransaction()
	link := n.Link(machine)
	count := 0
	for _, set := range cutSets {
		elements, err := nft.ListElements(context.Background(), "set", set)
		if err != nil {
			return fmt.Errorf("list cut links: %w", err)
		}
		for _, element := range elements {
			if slices.Contains(element.Key, link) {
				tx.Delete(element)
				count++
			}
		}
	}
	if count == 0 {
		return nil
	}
	if err := nft.Run(context.Background(), tx); err != nil {
		return fmt.Errorf("heal %s: %w", machine, err)
	}
	return nil
}

var cutSets = [...]string{"between", "to-host", "from-host"}

// Cuts lists which links are cut, as "c1 -> c2".
func (n Network) Cuts() ([]string, error) {
	nft, err := n.bridgeTable()
	if err != nil {
		return nil, err
	}
	name := func(link string) string { return strings.TrimPrefix(link, n.short()+"-") }
	var cuts []string
	for _, set := range cutSets {
		elements, err := nft.ListElements(context.Background(), "set", set)
		if knftables.IsNotFound(err) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("list cut links: %w", err)
		}
		for _, element := range elements {
			from, to := HostName, HostName
			switch set {
			case "between":
				from, to = name(element.Key[0]), name(element.Key[1])
			case "to-host":
				from = name(element.Key[0])
			case "from-host":
				to = name(element.Key[0])
			}
			cuts = append(cuts, from+" -> "+to)
		}
	}
	slices.Sort(cuts)
	return cuts, nil
}

func (n Network) changeCuts(machine string, others []string, direction Direction, change func(*knftables.Transaction, *knftables.Element)) error {
	nft, err := n.bridgeTable()
	if err != nil {
		return err
	}
	tx := nft.NewTransaction()
	link := n.Link(machine)
	for _, other := range others {
		if other == machine {
			continue
		}
		if direction != Out {
			if other == HostName {
				change(tx, &knftables.Element{Set: "from-host", Key: []string{link}})
			} else {
				change(tx, &knftables.Element{Set: "between", Key: []string{n.Link(other), link}})
			}
		}
		if direction != In {
			if other == HostName {
				change(tx, &knftables.Element{Set: "to-host", Key: []string{link}})
			} else {
				change(tx, &knftables.Element{Set: "between", Key: []string{link, n.Link(other)}})
			}
		}
	}
	if err := nft.Run(context.Background(), tx); err != nil {
		return fmt.Errorf("cut %s: %w", machine, err)
	}
	return nil
}
