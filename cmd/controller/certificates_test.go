package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/trust"
)

// A controller that runs for years has certificates all the time, also when a
// disk was full when they were due.
func TestCertificatesAreRenewed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		bundle, err := pki.CreateBundle(filepath.Join(dir, "bundle"))
		require.NoError(t, err)
		identity, err := bundle.Controller("c1", nil, nil)
		require.NoError(t, err)
		c := newCertificates(identity, bundle, filepath.Join(dir, "pki"), slog.New(slog.NewTextHandler(io.Discard, nil)))
		files, err := c.write()
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.run(ctx) }()

		valid := func() {
			t.Helper()
			require.Greater(t, time.Until(identity.Expires()), 30*24*time.Hour)
			pair, err := tls.LoadX509KeyPair(files.APIServingCert, files.APIServingKey)
			require.NoError(t, err)
			require.Equal(t, identity.Expires(), pair.Leaf.NotAfter)
			require.Equal(t, identity.Expires(), c.expiries()["api"])
		}
		for range 30 {
			time.Sleep(30 * 24 * time.Hour)
			synctest.Wait()
			valid()
		}
		// What is in the way of the files is found in the status.
		require.NoError(t, os.Rename(c.dir, c.dir+".away"))
		require.NoError(t, os.WriteFile(c.dir, nil, 0o600))
		before := identity.Expires()
		time.Sleep(time.Until(identity.Renewal()) + 2*certificateCheck)
		synctest.Wait()
		require.True(t, identity.Expires().After(before))
		require.Equal(t, before, c.expiries()["api"])
		require.NoError(t, os.Remove(c.dir))
		require.NoError(t, os.Rename(c.dir+".away", c.dir))
		time.Sleep(2 * certificateCheck)
		synctest.Wait()
		valid()
		cancel()
		require.ErrorIs(t, <-done, context.Canceled)
	})
}

func TestExpiriesAreBounded(t *testing.T) {
	t.Parallel()
	at := func(i int) time.Time { return time.Unix(int64(1000+i), 0) }
	for n, want := range map[int]int{0: 0, 1: 1, soonest: soonest, soonest + 1: soonest + 1, soonest + 2: soonest + 1, 5000: soonest + 1} {
		var list []*pb.Expiry
		for i := range n {
			list = append(list, expiry(kindToken, fmt.Sprint(i), at(n-i)))
		}
		got := soonestOf(list, "join tokens")
		require.Len(t, got, want)
		if n > soonest+1 {
			require.Equal(t, at(1).Unix(), got[0].UnixSeconds)
			require.Equal(t, fmt.Sprintf("%d more join tokens", n-soonest), got[soonest].What)
			require.Equal(t, at(soonest+1).Unix(), got[soonest].UnixSeconds)
		}
	}
}

func TestExpiriesOfNodesThatAreThere(t *testing.T) {
	t.Parallel()
	at := time.Unix(1000, 0)
	got := nodeExpiries([]trust.Node{
		{Name: "a1", Key: "k", Expires: at}, {Name: "deleted", Key: "k", Expires: at}, {Name: "reset", Expires: at},
		{Name: "revoked", Key: "k", Expires: at, Revoked: at}, {Name: "old", Key: "k"},
	}, func(name string) bool { return name != "deleted" })
	require.Len(t, got, 1)
	require.Equal(t, "node a1", got[0].What)
}
