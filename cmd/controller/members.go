package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/consensus"
	pb "timonel/proto/timonel/v1"
)

const membersPath = "/timonel/v1/members"

// memberChanges are the paths under membersPath that take a POST.
var memberChanges = map[string]pb.MemberChange{
	"add":             pb.MemberChange_MEMBER_CHANGE_ADD,
	"promote":         pb.MemberChange_MEMBER_CHANGE_PROMOTE,
	"remove":          pb.MemberChange_MEMBER_CHANGE_REMOVE,
	"transfer-leader": pb.MemberChange_MEMBER_CHANGE_TRANSFER_LEADER,
}

var memberResource = metav1.SchemeGroupVersion.WithResource("members").GroupResource()

// serveMembers lists the members as the leader sees them.
func (k *controller) serveMembers(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		writeStatus(w, apierrors.NewMethodNotSupported(memberResource, r.Method))
		return
	}
	list, err := k.replica.ListMembers(r.Context())
	if err != nil {
		writeStatus(w, apierrors.NewServiceUnavailable("members: "+err.Error()))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list) // the client went away
}

// serveMemberChange does one kind of change. The body is
// {"id": "c4", "address": "10.0.0.14:7444", "force": false}.
func (k *controller) serveMemberChange(kind pb.MemberChange) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			writeStatus(w, apierrors.NewMethodNotSupported(memberResource, r.Method))
			return
		}
		var body struct {
			ID      string `json:"id"`
			Address string `json:"address"`
			Force   bool   `json:"force"`
		}
		decoder := json.NewDecoder(io.LimitReader(r.Body, 64<<10))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&body); err != nil {
			writeStatus(w, apierrors.NewBadRequest(fmt.Sprintf("the body is not {\"id\", \"address\", \"force\"}: %v", err)))
			return
		}
		done, err := k.replica.ChangeMembers(r.Context(), consensus.Change{Kind: kind, ID: body.ID, Address: body.Address, Force: body.Force})
		var refused *consensus.RefusedError
		switch {
		case errors.As(err, &refused):
			conflict := apierrors.NewConflict(memberResource, body.ID, err)
			conflict.ErrStatus.Message = refused.Reason
			writeStatus(w, conflict)
			return
		case err != nil:
			writeStatus(w, apierrors.NewServiceUnavailable(fmt.Sprintf("%v: list the members before you try again", err)))
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]string{"done": done})
	})
}
