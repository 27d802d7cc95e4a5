package trust

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"time"

	"timonel/state"
)

// Node is what is known of a node's name: the public key that it is bound to, or
// that it may not be used.
type Node struct {
	Name string `json:"name"`
	// Key is the public key that the name is bound to, as [KeyOf] says; empty when
	// the name waits for the next one that joins with a token.
	Key   string    `json:"key,omitempty"`
	Bound time.Time `json:"bound,omitzero"`
	// Token is the id of the token that the node joined with, empty for one that
	// had its certificate before names were bound.
	Token string `json:"token,omitempty"`
	// Expires is when its newest certificate does.
	Expires time.Time `json:"expires,omitzero"`
	// Instance is the agent process that was admitted last: a name has one.
	Instance string `json:"instance,omitempty"`

	// Revoked is when the name was revoked, zero if it was not.
	Revoked time.Time `json:"revoked,omitzero"`
	// Reset is when the name was last reset: what was given to it before is good
	// for nothing.
	Reset time.Time `json:"reset,omitzero"`
	// By and Reason are about the last revocation or reset.
	By     string `json:"by,omitempty"`
	Reason string `json:"reason,omitempty"`
}

// nodeNames are DNS names of RFC 1123, as names of Node objects, that fit a label.
var nodeNames = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// reservedNames are the controllers', whether there are any of that name yet, and
// those that stand for the API server.
var (
	controllerNames = regexp.MustCompile(`^c[0-9]+$`)
	reservedNames   = []string{
		"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
		"kube-apiserver", "apiserver", "front-proxy-client", "kube-apiserver-kubelet-client", "timonel", "controller",
	}
)

// CheckNodeName says whether a node may have a name, whoever else is in the
// cluster.
func CheckNodeName(name string) error {
	switch {
	case name == "":
		return errors.New("the node's name is empty")
	case len(name) > 63:
		return fmt.Errorf("the node's name has %d characters, 63 are allowed", len(name))
	case !nodeNames.MatchString(name):
		return fmt.Errorf("the node's name %q is not a DNS name in small letters (a-z, 0-9, - and . between)", name)
	case controllerNames.MatchString(name):
		return fmt.Errorf("the name %s is reserved for controllers: give the node another", name)
	case slices.Contains(reservedNames, name):
		return fmt.Errorf("the name %s is reserved: give the node another", name)
	}
	return nil
}

// checkFree says whether a node may take a name.
func (r *Registry) checkFree(name string) error {
	if err := CheckNodeName(name); err != nil {
		return &RefusedError{Reason: err.Error()}
	}
	if why := r.reserved(name); why != "" {
		return refuse("the name %s is %s: give the node another", name, why)
	}
	return nil
}

// Join is a node that wants to join.
type Join struct {
	Secret  string // of the token
	Node    string // the name it wants
	Key     string // of its public key, as [KeyOf] says
	Expires time.Time
	// Within is as in [Registry.Renew], for one that joins again.
	Within time.Duration
}

// fresh says whether a certificate that is valid until recorded was given less than
// within before one that is valid until expires.
func fresh(recorded, expires time.Time, within time.Duration) bool {
	since := expires.Sub(recorded)
	return since == 0 || since > 0 && since < within
}

// Join binds a name to the first key that joins with a good token, and counts the
// token's use, in one transaction. Whoever repeats it with the same key, as after
// an answer that was lost, gets the same answer and uses nothing up. The node's
// certificate is to be valid until the record's Expires. A refusal is a
// [RefusedError].
func (r *Registry) Join(ctx context.Context, j Join) (Node, error) {
	var out Node
	err := r.change(ctx, func(view state.View, now time.Time) (*state.Txn, error) {
		token, tokenRevision, err := r.token(view, now, j.Secret)
		if err != nil {
			return nil, err
		}
		if err := r.checkFree(j.Node); err != nil {
			return nil, err
		}
		if len(token.Names) > 0 && !slices.Contains(token.Names, j.Node) {
			return nil, refuse("the join token %s is not for a node called %s", token.ID, j.Node)
		}
		if r.revoked(view, j.Key) {
			return nil, refuse("the key of this node was revoked: empty its data folder, so that it makes a new one")
		}
		node, nodeRevision, found, err := get[Node](view, nodePrefix+j.Node)
		if err != nil {
			return nil, err
		}
		switch {
		case found && !node.Revoked.IsZero():
			return nil, refuse("node %s was revoked: `timonel node reset %[1]s` lets a machine of that name join again", j.Node)
		case found && node.Key != "" && node.Key != j.Key:
			return nil, refuse("the name %s is bound to another key since %s: give this node another name, or, if its machine was built anew, forget the old key with `timonel node reset %[1]s`",
				j.Node, node.Bound.Format(time.RFC3339))
		}
		again := found && node.Key == j.Key && node.Token == token.ID
		if !again && token.Uses > 0 && token.Used >= token.Uses {
			return nil, ErrToken
		}
		expires := j.Expires.UTC().Truncate(time.Second)
		if again && fresh(node.Expires, expires, j.Within) {
			out = node
			return nil, nil
		}
		if node.Key == "" {
			node.Key, node.Bound = j.Key, now.UTC().Truncate(time.Second)
		}
		node.Name, node.Token, node.Expires = j.Node, token.ID, expires
		out = node
		txn := &state.Txn{
			Conditions: []state.Condition{
				{Key: tokenPrefix + token.ID, ModRevision: tokenRevision},
				{Key: nodePrefix + j.Node, ModRevision: nodeRevision},
				{Key: revokedPrefix + j.Key},
			},
			Changes: []state.Change{put(nodePrefix+j.Node, node, time.Time{})},
		}
		if !again {
			token.Used++
			txn.Changes = append(txn.Changes, put(tokenPrefix+token.ID, token, token.Expires))
		}
		return txn, nil
	})
	if err == nil && !out.Reset.IsZero() {
		err = r.awaitPast(ctx, out.Reset)
	}
	return out, err
}

// maxReset bounds how long a node that joins waits for the reset before to be past.
const maxReset = 5 * time.Second

// awaitPast waits until a reset is past, in whole seconds and by this controller's
// clock, as tokens' times of issue are: or else those of the new machine's first pods
// would count as the old one's.
func (r *Registry) awaitPast(ctx context.Context, reset time.Time) error {
	wait := reset.Add(time.Second).Sub(r.now())
	if wait <= 0 {
		return nil
	}
	timer := time.NewTimer(min(wait, maxReset))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Node returns the record of a name. found is false for a name that was never
// bound; the error means that there is a record and it cannot be read.
func (r *Registry) Node(name string) (node Node, found bool, err error) {
	node, _, found, err = get[Node](r.state.Store().View(), nodePrefix+name)
	return node, found, err
}

// Nodes are the records of all names, in order.
func (r *Registry) Nodes() []Node {
	return all[Node](r.state.Store().View(), nodePrefix, func(error) {})
}

// CheckNode says whether a certificate with this key speaks for the node called
// name: nil, or a [RefusedError]. A name without record is one of before names were
// bound, whose certificate is good until it connects, see [Registry.Admit].
func (r *Registry) CheckNode(name, key string) error {
	return r.checkNode(r.state.Store().View(), name, key)
}

func (r *Registry) checkNode(view state.View, name, key string) error {
	if r.revoked(view, key) {
		return refuse("the key of this certificate was revoked")
	}
	node, _, found, err := get[Node](view, nodePrefix+name)
	switch {
	case err != nil:
		return err
	case !found:
		return nil
	case !node.Revoked.IsZero():
		return refuse("node %s was revoked at %s", name, node.Revoked.Format(time.RFC3339))
	case node.Key == "":
		return refuse("node %s was reset at %s: it joins again with a token, with an empty data folder", name, node.Reset.Format(time.RFC3339))
	case node.Key != key:
		return refuse("the name %s is bound to another key", name)
	}
	return nil
}

// Admission is an agent that opens a stream with a certificate that was verified.
type Admission struct {
	Node, Key string
	Expires   time.Time // of the certificate
	Instance  string    // names the agent's process, or its stream
}

// Admit makes an agent's process the one of its node: from when it returns, the
// record names no other. A name without record, of a certificate from before names
// were bound, is bound to the certificate's key. Nothing is committed for a process
// that was admitted already. A refusal is a [RefusedError].
func (r *Registry) Admit(ctx context.Context, a Admission) error {
	admitted := func(view state.View) (bool, error) {
		if err := r.checkNode(view, a.Node, a.Key); err != nil {
			return false, err
		}
		node, _, found, err := get[Node](view, nodePrefix+a.Node)
		return found && node.Instance == a.Instance, err
	}
	if ok, err := admitted(r.state.Store().View()); ok || err != nil {
		return err
	}
	return r.change(ctx, func(view state.View, now time.Time) (*state.Txn, error) {
		if ok, err := admitted(view); ok || err != nil {
			return nil, err
		}
		node, revision, found, err := get[Node](view, nodePrefix+a.Node)
		if err != nil {
			return nil, err
		}
		if !found {
			if why := r.reserved(a.Node); why != "" {
				return nil, refuse("the name %s is %s", a.Node, why)
			}
			node = Node{Name: a.Node, Key: a.Key, Bound: now.UTC().Truncate(time.Second), Expires: a.Expires.UTC().Truncate(time.Second)}
		}
		node.Instance = a.Instance
		return &state.Txn{
			Conditions: []state.Condition{{Key: nodePrefix + a.Node, ModRevision: revision}, {Key: revokedPrefix + a.Key}},
			Changes:    []state.Change{put(nodePrefix+a.Node, node, time.Time{})},
		}, nil
	})
}

// Instance is the agent process that was admitted last under a name.
func (r *Registry) Instance(node string) string {
	n, _, _ := r.Node(node) // one that cannot be read admits nobody
	return n.Instance
}

// Renew records that a node's certificate is replaced by one that is valid until
// expires, and returns until when it is to be: one that was renewed less than within
// before is given again as it was then, and nothing is committed, so that a node that
// renews all the time does not fill the log. It is refused, with a [RefusedError], to
// whoever [Registry.CheckNode] refuses, and to a name without record.
func (r *Registry) Renew(ctx context.Context, name, key string, expires time.Time, within time.Duration) (time.Time, error) {
	var until time.Time
	err := r.change(ctx, func(view state.View, _ time.Time) (*state.Txn, error) {
		if err := r.checkNode(view, name, key); err != nil {
			return nil, err
		}
		node, revision, found, err := get[Node](view, nodePrefix+name)
		if err != nil {
			return nil, err
		}
		if !found {
			return nil, refuse("node %s has never connected with this certificate: it connects first", name)
		}
		expires := expires.UTC().Truncate(time.Second)
		if fresh(node.Expires, expires, within) {
			until = node.Expires
			return nil, nil
		}
		node.Expires, until = expires, expires
		return &state.Txn{
			Conditions: []state.Condition{{Key: nodePrefix + name, ModRevision: revision}, {Key: revokedPrefix + key}},
			Changes:    []state.Change{put(nodePrefix+name, node, time.Time{})},
		}, nil
	})
	return until, err
}

// CheckNodeToken says whether a token that was issued for something on a node is
// good: nil, or a [RefusedError] after the node was revoked, or for a token of
// before it was reset.
func (r *Registry) CheckNodeToken(name string, issued time.Time) error {
	return r.checkNodeToken(r.state.Store().View(), name, issued)
}

func (r *Registry) checkNodeToken(view state.View, name string, issued time.Time) error {
	node, _, found, err := get[Node](view, nodePrefix+name)
	switch {
	case err != nil:
		return err
	case !found:
		return nil
	case !node.Revoked.IsZero():
		return refuse("the token is of node %s, which was revoked at %s", name, node.Revoked.Format(time.RFC3339))
	case !node.Reset.IsZero() && !issued.After(node.Reset):
		return refuse("the token is of node %s as it was before it was reset at %s", name, node.Reset.Format(time.RFC3339))
	}
	return nil
}

// ResetNode forgets the key that a name is bound to, and revokes that key: a
// machine of this name may join again with a token. It ends a revocation too.
func (r *Registry) ResetNode(ctx context.Context, name string, by By) (Node, error) {
	return r.changeNode(ctx, name, func(node *Node, now time.Time) error {
		node.Key, node.Bound, node.Token, node.Expires, node.Instance = "", time.Time{}, "", time.Time{}, ""
		node.Revoked, node.Reset = time.Time{}, now
		node.By, node.Reason = by.User, by.Reason
		return nil
	})
}

// RevokeNode takes back whatever a node of this name was given, until the name is
// reset.
func (r *Registry) RevokeNode(ctx context.Context, name string, by By) (Node, error) {
	return r.changeNode(ctx, name, func(node *Node, now time.Time) error {
		if node.Revoked.IsZero() {
			node.Revoked = now
		}
		node.By, node.Reason = by.User, by.Reason
		return nil
	})
}

// changeNode changes a name's record and revokes the key that it was bound to.
func (r *Registry) changeNode(ctx context.Context, name string, edit func(node *Node, now time.Time) error) (Node, error) {
	var out Node
	if !nodeNames.MatchString(name) || len(name) > 63 {
		return out, refuse("%q is not the name of a node", name)
	}
	err := r.change(ctx, func(view state.View, now time.Time) (*state.Txn, error) {
		now = now.UTC().Truncate(time.Second)
		node, revision, _, err := get[Node](view, nodePrefix+name)
		if err != nil {
			return nil, err
		}
		was := node
		node.Name = name
		if err := edit(&node, now); err != nil {
			return nil, err
		}
		out = node
		txn := &state.Txn{
			Conditions: []state.Condition{{Key: nodePrefix + name, ModRevision: revision}},
			Changes:    []state.Change{put(nodePrefix+name, node, time.Time{})},
		}
		if was.Key != "" {
			txn.Changes = append(txn.Changes, r.revocation(Revocation{
				Key: was.Key, Of: "node " + name, At: now, By: node.By, Reason: node.Reason,
			}, was.Expires))
		}
		return txn, nil
	})
	return out, err
}
