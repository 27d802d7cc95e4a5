package apiserver

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	utilnet "k8s.io/apimachinery/pkg/util/net"

	"timonel/pki"
	"timonel/state"
	"timonel/state/storage/storagetest"
)

func TestConfigValidate(t *testing.T) {
	good := Config{
		Name: "c1", AdvertiseAddress: advertised, Backend: storagetest.NewLocalBackend(state.Options{}),
		Certificates: pki.Files{CA: "f", FrontProxyCA: "f", APIServingCert: "f", APIServingKey: "f",
			FrontProxyClientCert: "f", FrontProxyClientKey: "f", ServiceAccountKey: "f"},
	}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		change func(*Config)
		want   string // in the error
	}{
		{"no name", func(c *Config) { c.Name = "" }, "Name is required"},
		{"no backend", func(c *Config) { c.Backend = nil }, "Backend is required"},
		{"no address", func(c *Config) { c.AdvertiseAddress = nil }, "AdvertiseAddress is required"},
		{"any address", func(c *Config) { c.AdvertiseAddress = net.IPv4zero }, "AdvertiseAddress 0.0.0.0"},
		{"families", func(c *Config) {
			c.AdvertiseAddress = net.ParseIP("2001:db8::1")
			c.ServiceCIDRs = []netip.Prefix{DefaultServiceCIDR}
		}, "one IP family"},
		{"port", func(c *Config) { c.Port = 70000 }, "Port 70000"},
		{"network", func(c *Config) { c.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/30")} }, "ServiceCIDRs 10.0.0.0/30"},
		{"networks", func(c *Config) {
			c.ServiceCIDRs = []netip.Prefix{DefaultServiceCIDR, netip.MustParsePrefix("10.97.0.0/16")}
		}, "ServiceCIDRs"},
		{"node ports", func(c *Config) { c.NodePortRange = utilnet.PortRange{Base: 65000, Size: 1000} }, "NodePortRange 65000-65999"},
		{"toleration", func(c *Config) { c.UnreachableTolerationSeconds = -1 }, "UnreachableTolerationSeconds"},
		{"bounds of nodes", func(c *Config) { c.DisableAdmission = []string{"NodeRestriction"} }, "DisableAdmission NodeRestriction"},
		{"on and off", func(c *Config) {
			c.EnableAdmission, c.DisableAdmission = []string{"AlwaysPullImages"}, []string{"AlwaysPullImages"}
		}, "AlwaysPullImages is in EnableAdmission too"},
		{"no key", func(c *Config) { c.Certificates.ServiceAccountKey = "" }, "Certificates.ServiceAccountKey is required"},
		{"path", func(c *Config) { c.Paths = map[string]http.Handler{"/api/x": http.NotFoundHandler()} }, `Paths "/api/x"`},
		{"check", func(c *Config) { c.ReadyOnly = []string{"raft"} }, `ReadyOnly names "raft"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := good
			test.change(&c)
			if err := c.Validate(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q in it", err, test.want)
			}
		})
	}
}

func TestNewSaysThatAPortIsTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	bundle, err := pki.CreateBundle(filepath.Join(t.TempDir(), "bundle"))
	if err != nil {
		t.Fatal(err)
	}
	controller, err := bundle.Controller("c1", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	files, err := controller.WriteFiles(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	address := taken.Addr().(*net.TCPAddr)
	_, err = New(context.Background(), Config{
		Name: "c1", BindAddress: address.IP, Port: address.Port, AdvertiseAddress: advertised,
		Backend: storagetest.NewLocalBackend(state.Options{}), Certificates: files,
	})
	if err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("%v, want that the address is in use", err)
	}
}
