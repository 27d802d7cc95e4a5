package tables_test

import (
	"log/slog"
	"os/exec"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"sigs.k8s.io/knftables"

	"timonel/network/netlab"
	"timonel/network/tables"
)

// kept is a table with a chain.
type kept struct {
	l     *netlab.Node
	of    tables.Of
	trust tables.Trust
	nft   knftables.Interface
}

func keep(l *netlab.Node, w *tables.Watcher, name string) *kept {
	k := &kept{l: l, of: tables.Of{What: "tests", Family: knftables.InetFamily, Name: name}}
	nft, err := knftables.New(k.of.Family, name, knftables.UseNetlink)
	l.Must(err)
	k.nft = k.trust.Watch(w, nft)
	return k
}

func (k *kept) write(t *testing.T) {
	tx := k.nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Add(&knftables.Chain{Name: "c"})
	tx.Add(&knftables.Rule{Chain: "c", Rule: "accept"})
	k.l.Must(k.nft.Run(t.Context(), tx))
}

// touched says whether it is to be written anew.
func (k *kept) touched(t *testing.T) (yes bool) {
	k.l.Self().Do(func() {
		yes = k.trust.Touched(t.Context(), k.of, func(l *tables.Listing) bool { return len(l.Names["chain"]) == 1 && l.Rules["c"] > 0 }, slog.New(slog.DiscardHandler))
	})
	return yes
}

// TestOwnTablesAreNobodyElses: what one room writes, at the same time as another, is not
// somebody else's change to the other's table; what somebody else does to it is.
func TestOwnTablesAreNobodyElses(t *testing.T) {
	netlab.In(t, func(l *netlab.Node) {
		var w tables.Watcher
		one, other := keep(l, &w, "one"), keep(l, &w, "other")
		one.write(t)
		other.write(t)
		require.False(t, one.touched(t))
		require.False(t, other.touched(t))
		var both sync.WaitGroup
		for _, k := range []*kept{one, other} {
			both.Go(func() {
				l.Self().Do(func() {
					for range 20 {
						k.write(t)
					}
				})
			})
		}
		both.Wait()
		for range 2 { // the first time a table that has changed is read again
			require.False(t, one.touched(t))
			require.False(t, other.touched(t))
		}
		l.Must(exec.Command("nft", "add", "rule", "inet", "one", "c", "drop").Run())
		require.True(t, one.touched(t), "a rule of it")
		l.Must(exec.Command("nft", "delete", "table", "inet", "other").Run())
		require.True(t, other.touched(t), "all of it")
	})
}

// TestStrangersAreSeen: what somebody else did may have been to elements of a table, which
// leaves no trace that costs little to see. One that was not written for long is written anew.
func TestStrangersAreSeen(t *testing.T) {
	netlab.In(t, func(l *netlab.Node) {
		var w tables.Watcher
		k := keep(l, &w, "one")
		k.write(t)
		require.False(t, k.touched(t))
		l.Must(exec.Command("nft", "add", "table", "inet", "stranger").Run())
		require.True(t, k.touched(t), "it was never written whole")
	})
}
