package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/endpoints/request"

	"timonel/gossip"
	"timonel/trust"
)

// Paths of join tokens and of nodes' identities, for system:masters and whoever RBAC
// lets at these nonResourceURLs.
const (
	tokensPath = "/timonel/v1/tokens"
	nodesPath  = "/timonel/v1/nodes"

	trustTimeout = 15 * time.Second
)

var (
	tokenResource    = metav1.SchemeGroupVersion.WithResource("tokens").GroupResource()
	identityResource = metav1.SchemeGroupVersion.WithResource("nodes").GroupResource()
)

// reservedName says whose a name is that no node may have.
func (k *controller) reservedName(name string) string {
	if name == k.name {
		return "a controller's"
	}
	for _, m := range k.replica.Status().Members {
		if m.ID == name {
			return "a controller's"
		}
	}
	if m, ok := k.directory.controllers.Member(name); ok && m.Role == gossip.RoleController && m.State != gossip.Left && m.State != gossip.Dead {
		return "a controller's"
	}
	return ""
}

// found records when the cluster was founded, on the first leader of all.
func (k *controller) found(ctx context.Context) error {
	for {
		at := time.Now()
		if err := k.cache.WaitRevision(ctx, k.store.View().Revision()); err != nil {
			return err
		}
		if system, ok := k.cache.Snapshot().Namespaces().Get("", metav1.NamespaceSystem); ok {
			at = system.CreationTimestamp.Time
		}
		err := k.trust.Found(ctx, at, k.bundle.BootstrapSecret())
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		k.log.Warn("the founding of the cluster could not be recorded, trying again", "err", err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// tokenRequest is the body of a new token; newToken the answer, which alone has the
// token's text.
type tokenRequest struct {
	TTLSeconds  int64    `json:"ttlSeconds,omitempty"`
	Uses        int      `json:"uses,omitempty"`
	Names       []string `json:"names,omitempty"`
	Description string   `json:"description,omitempty"`
}

type newToken struct {
	trust.Token
	Text string `json:"text"`
}

// serveTokens lists join tokens, without what would let one join, and makes them.
func (k *controller) serveTokens(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), trustTimeout)
	defer cancel()
	switch r.Method {
	case http.MethodGet:
		if err := k.replica.ReadBarrier(ctx); err != nil {
			answerTrust(w, tokenResource, "", nil, err)
			return
		}
		tokens := k.trust.Tokens()
		for i := range tokens {
			tokens[i].Hash = ""
		}
		answerTrust(w, tokenResource, "", tokens, nil)
	case http.MethodPost:
		var body tokenRequest
		if !readBody(w, r, &body) {
			return
		}
		token, secret, err := k.trust.CreateToken(ctx, trust.TokenSpec{
			TTL: time.Duration(min(body.TTLSeconds, int64(trust.MaxTokenTTL/time.Second)+1)) * time.Second, Uses: body.Uses, Names: body.Names,
			Description: body.Description, By: userOf(r),
		})
		token.Hash = ""
		if err == nil {
			k.log.Info("a join token was made", "id", token.ID, "by", token.By, "expires", token.Expires)
		}
		answerTrust(w, tokenResource, "", newToken{token, k.bundle.JoinToken(secret)}, err)
	default:
		writeStatus(w, apierrors.NewMethodNotSupported(tokenResource, r.Method))
	}
}

// serveToken revokes one.
func (k *controller) serveToken(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodDelete {
		writeStatus(w, apierrors.NewMethodNotSupported(tokenResource, r.Method))
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), trustTimeout)
	defer cancel()
	id := strings.TrimPrefix(r.URL.Path, tokensPath+"/")
	err := k.trust.RevokeToken(ctx, id)
	if err == nil {
		k.log.Info("a join token was revoked", "id", id, "by", userOf(r))
	}
	answerTrust(w, tokenResource, id, map[string]string{"done": "join token " + id + " is revoked"}, err)
}

// serveNodes lists what nodes' names are bound to.
func (k *controller) serveNodes(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		writeStatus(w, apierrors.NewMethodNotSupported(identityResource, r.Method))
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), trustTimeout)
	defer cancel()
	err := k.replica.ReadBarrier(ctx)
	answerTrust(w, identityResource, "", k.trust.Nodes(), err)
}

// serveNodeChange revokes or resets one: POST …/NAME/revoke or …/NAME/reset with
// {"reason": "…"}.
func (k *controller) serveNodeChange(w http.ResponseWriter, r *http.Request) {
	name, verb, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, nodesPath+"/"), "/")
	change := map[string]func(context.Context, string, trust.By) (trust.Node, error){
		"revoke": k.trust.RevokeNode, "reset": k.trust.ResetNode,
	}[verb]
	switch {
	case change == nil:
		writeStatus(w, apierrors.NewBadRequest("want "+nodesPath+"/NAME/revoke or /reset"))
		return
	case r.Method != http.MethodPost:
		writeStatus(w, apierrors.NewMethodNotSupported(identityResource, r.Method))
		return
	}
	var body struct {
		Reason string `json:"reason"`
	}
	if !readBody(w, r, &body) {
		return
	}
	if len(body.Reason) > 1024 {
		writeStatus(w, apierrors.NewBadRequest("the reason has more than 1024 characters"))
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), trustTimeout)
	defer cancel()
	node, err := change(ctx, name, trust.By{User: userOf(r), Reason: body.Reason})
	if err == nil {
		k.log.Warn("a node's identity was changed", "node", name, "change", verb, "by", node.By, "reason", node.Reason)
	}
	answerTrust(w, identityResource, name, node, err)
}

func userOf(r *http.Request) string {
	if u, ok := request.UserFrom(r.Context()); ok {
		return u.GetName()
	}
	return ""
}

// readBody decodes a small JSON body strictly, or answers what is wrong with it.
func readBody(w http.ResponseWriter, r *http.Request, into any) bool {
	decoder := json.NewDecoder(io.LimitReader(r.Body, 64<<10))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		writeStatus(w, apierrors.NewBadRequest(fmt.Sprintf("the body is not what %s takes: %v", r.URL.Path, err)))
		return false
	}
	return true
}

func answerTrust(w http.ResponseWriter, resource schema.GroupResource, name string, answer any, err error) {
	var refused *trust.RefusedError
	switch {
	case errors.Is(err, trust.ErrNotFound):
		writeStatus(w, apierrors.NewNotFound(resource, name))
	case errors.As(err, &refused):
		writeStatus(w, apierrors.NewBadRequest(refused.Reason))
	case err != nil:
		writeStatus(w, apierrors.NewServiceUnavailable(err.Error()+": look at the list before you try again"))
	default:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(answer) // the client went away
	}
}
