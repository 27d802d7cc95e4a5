package apiserver

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/features"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/keyutil"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	"k8s.io/kubernetes/pkg/controlplane/reconcilers"
	"k8s.io/kubernetes/pkg/kubeapiserver/authorizer/modes"
	"k8s.io/kubernetes/pkg/serviceaccount"
	"k8s.io/kubernetes/plugin/pkg/admission/defaulttolerationseconds"
)

// processMu guards what Kubernetes keeps in process-wide variables.
var processMu sync.Mutex

// setProcessWide sets Kubernetes' process-wide variables.
func setProcessWide(c Config) error {
	processMu.Lock()
	defer processMu.Unlock()

	// Identity and peer leases would write to the log every few seconds; gossip
	// knows which controllers are alive. All controllers have the same version
	// but during an upgrade, which goes one by one in any case.
	for _, gate := range []string{string(features.UnknownVersionInteroperabilityProxy), string(features.APIServerIdentity)} {
		if err := utilfeature.DefaultMutableFeatureGate.Set(gate + "=false"); err != nil {
			return fmt.Errorf("turn off the feature %s: %w", gate, err)
		}
	}

	// The plugin takes its defaults from flags alone.
	flags := pflag.NewFlagSet("admission", pflag.ContinueOnError)
	defaulttolerationseconds.RegisterFlags(flags)
	seconds := strconv.FormatInt(c.UnreachableTolerationSeconds, 10)
	for _, flag := range []string{"default-not-ready-toleration-seconds", "default-unreachable-toleration-seconds"} {
		if err := flags.Set(flag, seconds); err != nil {
			return fmt.Errorf("set the default toleration seconds: %w", err)
		}
	}

	// The server's own clients would log warnings about the server's own objects.
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	return nil
}

// newOptions returns upstream's options for c, complete and valid.
func newOptions(ctx context.Context, c Config) (options.CompletedOptions, error) {
	err := setProcessWide(c)
	if err != nil {
		return options.CompletedOptions{}, err
	}
	o := options.NewServerRunOptions()

	o.SecureServing.BindAddress = c.BindAddress
	o.SecureServing.BindPort = c.Port
	o.SecureServing.Listener = c.Listener
	o.SecureServing.ServerCert.CertKey.CertFile = c.Certificates.APIServingCert
	o.SecureServing.ServerCert.CertKey.KeyFile = c.Certificates.APIServingKey
	o.GenericServerRunOptions.AdvertiseAddress = c.AdvertiseAddress
	// Ends watches first thing in a shutdown, so that clients move on and their
	// connections are idle.
	o.GenericServerRunOptions.ShutdownWatchTerminationGracePeriod = time.Second

	// None, and not "from a file that is not given", which is logged as an error.
	o.Metrics.AllowListMapping = map[string]string{}

	// Nothing connects there; the options and the storage factory made from them
	// only carry codecs and prefixes.
	o.Etcd.StorageConfig.Transport.ServerList = []string{"timonel.invalid"}
	o.Etcd.StorageConfig.CompactionInterval = 0
	o.Etcd.StorageConfig.DBMetricPollInterval = 0
	o.Etcd.SkipHealthEndpoints = true
	o.Etcd.EnableWatchCache = false

	o.Authentication.ClientCert.ClientCA = c.Certificates.CA
	o.Authentication.BootstrapToken.Enable = true
	o.Authentication.RequestHeader.ClientCAFile = c.Certificates.FrontProxyCA
	o.Authentication.RequestHeader.AllowedNames = []string{"front-proxy-client"}
	o.Authentication.RequestHeader.UsernameHeaders = []string{"X-Remote-User"}
	o.Authentication.RequestHeader.UIDHeaders = []string{"X-Remote-Uid"}
	o.Authentication.RequestHeader.GroupHeaders = []string{"X-Remote-Group"}
	o.Authentication.RequestHeader.ExtraHeaderPrefixes = []string{"X-Remote-Extra-"}
	o.Authentication.ServiceAccounts.Issuers = []string{Issuer}
	// Upstream reads a public key from a file only if it is not in PKCS #8.
	o.Authentication.ServiceAccounts.ExternalPublicKeysGetter, err = publicKeys(c.Certificates.ServiceAccountKey)
	if err != nil {
		return options.CompletedOptions{}, err
	}
	o.ServiceAccountSigningKeyFile = c.Certificates.ServiceAccountKey

	o.Authorization.Modes = []string{modes.ModeNode, modes.ModeRBAC}
	o.Admission.GenericAdmission.EnablePlugins = append([]string{"NodeRestriction"}, c.EnableAdmission...)
	o.Admission.GenericAdmission.DisablePlugins = c.DisableAdmission
	o.Admission.GenericAdmission.ConfigFile = c.AdmissionConfig
	addNodeNetwork(o, c)
	o.Admission.GenericAdmission.Decorators = append(
		admission.Decorators{skipQuota(c.Backend.Store, o.Etcd.StorageConfig.Prefix)}, o.Admission.GenericAdmission.Decorators...)

	o.ProxyClientCertFile = c.Certificates.FrontProxyClientCert
	o.ProxyClientKeyFile = c.Certificates.FrontProxyClientKey
	// Controllers have no service proxy, so cluster IPs lead nowhere.
	o.EnableAggregatorRouting = true

	o.AllowPrivileged = true
	o.EventTTL = c.EventTTL
	services := make([]string, 0, len(c.ServiceCIDRs))
	for _, s := range c.ServiceCIDRs {
		services = append(services, s.String())
	}
	o.ServiceClusterIPRanges = strings.Join(services, ",")
	o.ServiceNodePortRange = c.NodePortRange
	o.EndpointReconcilerType = string(reconcilers.NoneEndpointReconcilerType)

	completed, err := o.Complete(ctx)
	if err != nil {
		return options.CompletedOptions{}, fmt.Errorf("complete the API server's options: %w", err)
	}
	if errs := completed.Validate(); len(errs) > 0 {
		return options.CompletedOptions{}, fmt.Errorf("validate the API server's options: %w", errors.Join(errs...))
	}
	return completed, nil
}

// publicKeys returns what verifies the tokens signed with the private key in
// file.
func publicKeys(file string) (serviceaccount.PublicKeysGetter, error) {
	private, err := keyutil.PrivateKeyFromFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the service account key %s: %w", file, err)
	}
	signer, ok := private.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("read the service account key %s: a %T cannot sign", file, private)
	}
	keys, err := serviceaccount.StaticPublicKeysGetter([]any{signer.Public()})
	if err != nil {
		return nil, fmt.Errorf("use the service account key %s: %w", file, err)
	}
	return keys, nil
}
