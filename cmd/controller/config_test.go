package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"timonel/pki"
)

func TestConfigNamesTheWrongFlag(t *testing.T) {
	t.Parallel()
	good := func() config {
		c := defaultConfig()
		c.name, c.dataDir, c.bundleDir, c.bindIP = "c1", "/data", "/bundle", "10.0.0.1"
		c.join = []string{"10.0.0.2:7946"}
		return c
	}
	for _, tc := range []struct {
		name   string
		change func(*config)
		want   string // in the error; empty: none
	}{
		{"good", func(*config) {}, ""},
		{"name", func(c *config) { c.name = "C_1" }, `--name: "C_1"`},
		{"no data folder", func(c *config) { c.dataDir = "" }, "--data-dir: required"},
		{"no bundle", func(c *config) { c.bundleDir = "" }, "--bundle: required"},
		{"no address", func(c *config) { c.bindIP = "" }, "--bind-ip: required"},
		{"not an address", func(c *config) { c.bindIP = "c1.example" }, `--bind-ip: "c1.example"`},
		{"unreachable address", func(c *config) { c.bindIP, c.advertiseIP = "0.0.0.0", "0.0.0.0" }, `--advertise-ip: "0.0.0.0"`},
		{"even number", func(c *config) { c.bootstrapExpect = 2 }, "--bootstrap-expect: 2 is not 1, 3 or 5"},
		{"seed without port", func(c *config) { c.join = []string{"10.0.0.2"} }, `--join: "10.0.0.2" is not host:port`},
		{"names for the certificate", func(c *config) { c.tlsSAN = []string{"192.0.2.7", "2001:db8::7", "api.example.org", "*.example.org"} }, ""},
		{"neither address nor name", func(c *config) { c.tlsSAN = []string{"https://api.example.org"} }, `--tls-san: "https://api.example.org"`},
		{"every address", func(c *config) { c.tlsSAN = []string{"0.0.0.0"} }, `--tls-san: "0.0.0.0"`},
		{"port", func(c *config) { c.apiPort = 70000 }, "--api-port: 70000"},
		{"port twice", func(c *config) { c.raftPort = c.clusterPort }, "--raft-port: 7443 is also --cluster-port"},
		{"network", func(c *config) { c.clusterCIDR = []string{"10.244.0.1/16"} }, "--cluster-cidr"},
		{"domain", func(c *config) { c.clusterDomain = "corp.example" }, ""},
		{"not a domain", func(c *config) { c.clusterDomain = "corp..example" }, "--cluster-domain"},
		{"toleration", func(c *config) { c.unreachableToleration = 0 }, "--unreachable-toleration"},
		{"snapshots to a folder", func(c *config) { c.backups = backupConfig{interval: time.Hour, retain: 1, dir: "/backups"} }, ""},
		{"snapshots to S3", func(c *config) { c.backups = backupConfig{interval: time.Hour, retain: 1, url: "s3://b/p"} }, ""},
		{"snapshots nowhere", func(c *config) { c.backups = backupConfig{interval: time.Hour, retain: 1} }, "--snapshot-dir: required"},
		{"snapshots never", func(c *config) { c.backups = backupConfig{retain: 1, dir: "/backups"} }, "--snapshot-interval: required"},
		{"snapshots all the time", func(c *config) { c.backups = backupConfig{interval: 1, retain: 1, dir: "/backups"} }, "--snapshot-interval: 1ns"},
		{"no snapshot kept", func(c *config) { c.backups = backupConfig{interval: time.Hour, dir: "/backups"} }, "--snapshot-retain: 0"},
		{"snapshots to two places", func(c *config) {
			c.backups = backupConfig{interval: time.Hour, retain: 1, dir: "/backups", url: "s3://b/p"}
		}, "--snapshot-dir: and --snapshot-s3"},
		{"not a bucket", func(c *config) { c.backups = backupConfig{interval: time.Hour, retain: 1, url: "https://b/p"} }, "--snapshot-s3"},
		{"no scheduler config", func(c *config) { c.schedulerConfig = "/none" }, "--scheduler-config: open /none"},
		{"wrong scheduler config", func(c *config) { c.schedulerConfig = "config.go" }, "--scheduler-config: config.go: "},
		{"share", func(c *config) { c.evictions.Share = 2 }, "--unhealthy-zone-threshold"},
		{"no evictions", func(c *config) {
			c.evictions.EvictionRate, c.evictions.SecondaryEvictionRate, c.evictions.LargeZone = 0, 0, 0
		}, ""},
		{"rate", func(c *config) { c.evictions.EvictionRate = -1 }, "--node-eviction-rate"},
		{"secondary rate", func(c *config) { c.evictions.SecondaryEvictionRate = -1 }, "--secondary-node-eviction-rate"},
		{"large", func(c *config) { c.evictions.LargeZone = -1 }, "--large-cluster-size-threshold"},
		{"both families", func(c *config) {
			c.clusterCIDR, c.serviceCIDR = []string{"10.244.0.0/16", "fd00:244::/48", "10.12.0.0/20"}, []string{"10.96.0.0/16", "fd00:96::/112"}
			c.nodeBits4 = 22
		}, ""},
		{"whose addresses", func(c *config) { c.podAddresses = "any" }, `--pod-addresses: "any" is not node or cluster`},
		{"pods twice", func(c *config) { c.clusterCIDR = []string{"10.244.0.0/16", "10.244.8.0/22"} }, "--cluster-cidr: 10.244.8.0/22 overlaps 10.244.0.0/16"},
		{"nodes too wide", func(c *config) { c.nodeBits4 = 12 }, "--cluster-cidr: a node's part of 10.244.0.0/16"},
		{"pods are Services", func(c *config) { c.serviceCIDR = []string{"10.244.128.0/20"} }, "--service-cidr: 10.244.128.0/20 overlaps 10.244.0.0/16 of --cluster-cidr"},
		{"two of one family", func(c *config) { c.serviceCIDR = []string{"10.96.0.0/16", "10.97.0.0/16"} }, "--service-cidr: 10.96.0.0/16, 10.97.0.0/16: give one"},
		{"no Services", func(c *config) { c.serviceCIDR = nil }, "--service-cidr"},
		{"very many Services", func(c *config) { c.serviceCIDR = []string{"fd00::/32"} }, "--service-cidr: fd00::/32 has more addresses"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c := good()
			tc.change(&c)
			err := c.complete()
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("got %v, want none", err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

// The API's certificate is valid for what --tls-san and 'timonel up' name, and for
// this controller's own addresses.
func TestServingNames(t *testing.T) {
	t.Setenv("TIMONEL_TLS_SAN", "10.77.0.1,lb.example.org")
	c := defaultConfig()
	c.name, c.dataDir, c.bundleDir, c.bindIP = "c1", t.TempDir(), filepath.Join(t.TempDir(), "bundle"), "10.0.0.1"
	c.tlsSAN = []string{"192.0.2.7", "api.example.org"}
	if err := c.complete(); err != nil {
		t.Fatal(err)
	}
	ips, names, err := c.servingNames()
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := pki.CreateBundle(c.bundleDir)
	if err != nil {
		t.Fatal(err)
	}
	identity, err := bundle.Controller(c.name, ips, names)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // as issued, and as renewed
		pair, err := identity.Credentials().APIServing.TLS()
		if err != nil {
			t.Fatal(err)
		}
		for _, host := range []string{"10.0.0.1", "10.96.0.1", "c1", "10.77.0.1", "lb.example.org", "192.0.2.7", "api.example.org"} {
			if err := pair.Leaf.VerifyHostname(host); err != nil {
				t.Errorf("who reaches the API by %s is refused: %v", host, err)
			}
		}
		if err := identity.Renew(); err != nil {
			t.Fatal(err)
		}
	}
}

// A flag of networks that is given again replaces what was given before, as 'timonel up
// --controller-flag' does.
func TestNetworksGivenAgain(t *testing.T) {
	t.Parallel()
	c := defaultConfig()
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	c.flags(f)
	if err := f.Parse([]string{"--cluster-cidr", "10.245.0.0/16", "--cluster-cidr=10.1.0.0/16,fd00:1::/48"}); err != nil {
		t.Fatal(err)
	}
	if got := c.pods().String(); got != "10.1.0.0/16, fd00:1::/48" {
		t.Errorf("got %s", got)
	}
}

// TestDNSAddress: the tenth address of the Services' network, if it has one.
func TestDNSAddress(t *testing.T) {
	t.Parallel()
	for cidr, want := range map[string]string{
		"10.96.0.0/16": "[10.96.0.10]", "10.0.0.16/28": "[10.0.0.26]", "10.0.0.0/29": "[]", "fd00:96::/108": "[fd00:96::a]",
	} {
		c := defaultConfig()
		c.serviceCIDR = []string{cidr}
		if got := fmt.Sprint(c.dnsAddresses()); got != want {
			t.Errorf("%s: got %s, want %s", cidr, got, want)
		}
	}
}

func TestOneLine(t *testing.T) {
	t.Parallel()
	err := fmt.Errorf("start: %w", errors.Join(errors.New("a"), errors.New("b\nc")))
	if got := oneLine(err); strings.Contains(got, "\n") {
		t.Errorf("%q has more than one line", got)
	}
	if got, want := oneLine(errors.Join(errors.New("a"), errors.New("b"))), "a; b"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A rate of 0 is none, as the flag says, and not what is taken when nothing is said.
func TestEvictionRates(t *testing.T) {
	t.Parallel()
	c := defaultConfig()
	if got := c.health(); got != c.evictions {
		t.Errorf("got %+v, want the flags' defaults %+v", got, c.evictions)
	}
	c.evictions.EvictionRate, c.evictions.SecondaryEvictionRate, c.evictions.LargeZone = 0, 0, 0
	if got := c.health(); got.EvictionRate >= 0 || got.SecondaryEvictionRate >= 0 || got.LargeZone != 1 {
		t.Errorf("got %+v, want no evictions and every zone large", got)
	}
}
