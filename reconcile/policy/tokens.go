package policy

import (
	"bytes"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/reconcile"
	"timonel/state/objects"
)

// Tokens fills Secrets of type kubernetes.io/service-account-token with a token,
// the CA and the namespace, deletes them with their ServiceAccount, and takes the
// ServiceAccount's reference to a Secret that was deleted away.
type Tokens struct {
	// Signer makes the tokens.
	Signer *TokenSigner
	// RootCA is the CA bundle in PEM. Without one Secrets get none.
	RootCA []byte
}

var (
	secretKind         = corev1.SchemeGroupVersion.WithKind("Secret")
	serviceAccountKind = corev1.SchemeGroupVersion.WithKind("ServiceAccount")
	secretsResource    = corev1.SchemeGroupVersion.WithResource("secrets")
)

// Name implements Reconciler.
func (Tokens) Name() string { return "serviceaccount-token-controller" }

// referenceKey is for the reference that a ServiceAccount has to a Secret which
// was deleted. Others that lead nowhere are not touched: their Secret may yet come.
func referenceKey(secret *corev1.Secret) reconcile.Key {
	return reconcile.Key{
		Kind: serviceAccountKind.Kind, Namespace: secret.Namespace,
		Name: secret.Annotations[corev1.ServiceAccountNameKey] + "/" + secret.Name,
		UID:  types.UID(secret.Annotations[corev1.ServiceAccountUIDKey]),
	}
}

// tokenSecret returns the Secret that m is if it is for a ServiceAccount's token, else nil.
func tokenSecret(m *objects.Meta) *corev1.Secret {
	if m == nil {
		return nil
	}
	if secret, ok := m.Object.(*corev1.Secret); ok && secret.Type == corev1.SecretTypeServiceAccountToken {
		return secret
	}
	return nil
}

// All implements Reconciler.
func (Tokens) All(s *objects.Snapshot) []reconcile.Key {
	var keys []reconcile.Key
	for secret := range s.Secrets().All() {
		if secret.Type == corev1.SecretTypeServiceAccountToken {
			keys = append(keys, reconcile.KeyOf(secretKind, secret))
		}
	}
	return keys
}

// Keys implements Reconciler: a Secret follows itself and its ServiceAccount's end.
func (Tokens) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	switch c.Meta().GVK {
	case secretKind:
		if secret := tokenSecret(c.New); secret != nil {
			return []reconcile.Key{reconcile.KeyOf(secretKind, secret)}
		}
		if secret := tokenSecret(c.Old); secret != nil && c.New == nil {
			return []reconcile.Key{referenceKey(secret)}
		}
	case serviceAccountKind:
		if c.Old == nil || c.New != nil && c.New.UID == c.Old.UID {
			return nil
		}
		var keys []reconcile.Key
		for secret := range s.Secrets().InNamespace(c.Old.Namespace) {
			if secret.Type == corev1.SecretTypeServiceAccountToken && secret.Annotations[corev1.ServiceAccountNameKey] == c.Old.Name {
				keys = append(keys, reconcile.KeyOf(secretKind, secret))
			}
		}
		return keys
	}
	return nil
}

// Reconcile implements Reconciler.
func (t Tokens) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	if key.Kind == serviceAccountKind.Kind {
		return removeReference(in, key), nil
	}
	secret, ok := in.Snapshot.Secrets().Get(key.Namespace, key.Name)
	if !ok || secret.Type != corev1.SecretTypeServiceAccountToken {
		return reconcile.Result{}, nil
	}
	var result reconcile.Result
	name, uid := secret.Annotations[corev1.ServiceAccountNameKey], secret.Annotations[corev1.ServiceAccountUIDKey]
	if name == "" {
		return result, nil // the API lets none in
	}
	account := accountOf(in.Snapshot, secret.Namespace, name, types.UID(uid))
	if account == nil {
		if secret.DeletionTimestamp == nil {
			result.Add(reconcile.Delete(secretsResource, secret))
		}
		return result, nil
	}
	needsCA := len(t.RootCA) > 0 && !bytes.Equal(secret.Data[corev1.ServiceAccountRootCAKey], t.RootCA)
	needsNamespace := len(secret.Data[corev1.ServiceAccountNamespaceKey]) == 0
	needsToken := len(secret.Data[corev1.ServiceAccountTokenKey]) == 0
	if !needsCA && !needsNamespace && !needsToken || secret.Immutable != nil && *secret.Immutable {
		return result, nil
	}
	next := secret.DeepCopy()
	if next.Data == nil {
		next.Data = map[string][]byte{}
	}
	if needsCA {
		next.Data[corev1.ServiceAccountRootCAKey] = t.RootCA
	}
	if needsNamespace {
		next.Data[corev1.ServiceAccountNamespaceKey] = []byte(secret.Namespace)
	}
	if needsToken {
		token, err := t.Signer.Token(account, secret)
		if err != nil {
			return result, err
		}
		next.Data[corev1.ServiceAccountTokenKey] = []byte(token)
	}
	next.Annotations[corev1.ServiceAccountNameKey] = account.Name
	next.Annotations[corev1.ServiceAccountUIDKey] = string(account.UID)
	result.Add(reconcile.Update(secretsResource, next))
	return result, nil
}

// accountOf returns the ServiceAccount with the name and, if one is given, the UID.
func accountOf(s *objects.Snapshot, namespace, name string, uid types.UID) *corev1.ServiceAccount {
	account, ok := s.ServiceAccounts().Get(namespace, name)
	if !ok || uid != "" && account.UID != uid {
		return nil
	}
	return account
}

// removeReference takes the reference away that a key of referenceKey is about.
func removeReference(in reconcile.Input, key reconcile.Key) reconcile.Result {
	var result reconcile.Result
	name, secret, _ := strings.Cut(key.Name, "/")
	account := accountOf(in.Snapshot, key.Namespace, name, key.UID)
	if account == nil || !refersTo(account, secret) {
		return result
	}
	if _, ok := in.Snapshot.Secrets().Get(key.Namespace, secret); ok {
		return result // there is one of that name again
	}
	next := account.DeepCopy()
	next.Secrets = nil
	for _, ref := range account.Secrets {
		if ref.Name != secret {
			next.Secrets = append(next.Secrets, ref)
		}
	}
	result.Add(reconcile.Update(reconcile.ServiceAccountsResource, next))
	return result
}

// refersTo says whether a ServiceAccount lists a Secret.
func refersTo(account *corev1.ServiceAccount, secret string) bool {
	for _, ref := range account.Secrets {
		if ref.Name == secret {
			return true
		}
	}
	return false
}
