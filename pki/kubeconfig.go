package pki

import (
	"fmt"
	"os"
	"path/filepath"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// KubeContext is one context of a kubeconfig.
type KubeContext struct {
	Name   string // of the context and of its cluster entry
	Server string // https://host:port
}

// KubeconfigSpec says what a kubeconfig holds.
type KubeconfigSpec struct {
	CA       []byte // PEM
	User     string // name of the user entry
	Client   KeyPair
	Contexts []KubeContext
	Current  string // the default context; the first one when empty
}

// Kubeconfig returns a kubeconfig, YAML, with one user and any number of
// contexts, and all certificates inside.
func Kubeconfig(spec KubeconfigSpec) ([]byte, error) {
	if len(spec.Contexts) == 0 {
		return nil, fmt.Errorf("write kubeconfig of %s: no contexts", spec.User)
	}
	config := api.NewConfig()
	config.AuthInfos[spec.User] = &api.AuthInfo{
		ClientCertificateData: spec.Client.Cert,
		ClientKeyData:         spec.Client.Key,
	}
	config.CurrentContext = spec.Current
	if config.CurrentContext == "" {
		config.CurrentContext = spec.Contexts[0].Name
	}
	for _, c := range spec.Contexts {
		if config.Contexts[c.Name] != nil {
			return nil, fmt.Errorf("write kubeconfig of %s: two contexts are called %s", spec.User, c.Name)
		}
		config.Clusters[c.Name] = &api.Cluster{Server: c.Server, CertificateAuthorityData: spec.CA}
		config.Contexts[c.Name] = &api.Context{Cluster: c.Name, AuthInfo: spec.User}
	}
	if config.Contexts[config.CurrentContext] == nil {
		return nil, fmt.Errorf("write kubeconfig of %s: there is no context %s", spec.User, config.CurrentContext)
	}
	out, err := clientcmd.Write(*config)
	if err != nil {
		return nil, fmt.Errorf("write kubeconfig of %s: %w", spec.User, err)
	}
	return out, nil
}

// WriteKubeconfig writes a kubeconfig to path, whole or not at all, for its
// owner's eyes only.
func WriteKubeconfig(path string, spec KubeconfigSpec) error {
	data, err := Kubeconfig(spec)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write kubeconfig of %s: %w", spec.User, err)
	}
	if err := replaceFile(path, data, 0o600); err != nil {
		return fmt.Errorf("write kubeconfig of %s: %w", spec.User, err)
	}
	return nil
}
