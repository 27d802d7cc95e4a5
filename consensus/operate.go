package consensus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "timonel/proto/timonel/v1"
)

// What an operator does with the members. Any replica takes the request; the
// leader decides and does it.

// MemberList is the members as the leader sees them.
type MemberList struct {
	// Leader and Term are who says so; both zero when no leader is known, and the
	// list is what this replica knows.
	Leader string `json:"leader"`
	Term   uint64 `json:"term"`
	// CommitIndex is the last entry known to be committed.
	CommitIndex uint64 `json:"commitIndex"`
	// Quorum is how many voters must be there, and Healthy how many are.
	Quorum  int `json:"quorum"`
	Healthy int `json:"healthyVoters"`
	// Members are sorted by name.
	Members []MemberInfo `json:"members"`
	// Problems are sentences for the operator.
	Problems []string `json:"problems,omitempty"`
}

// MemberInfo is what the leader knows of one member.
type MemberInfo struct {
	ID      string `json:"id"`
	Address string `json:"address"`
	// Role is "leader", "voter" or "non-voter".
	Role string `json:"role"`
	// Healthy: it answers and follows this leader. Problem says why not.
	Healthy bool   `json:"healthy"`
	Problem string `json:"problem,omitempty"`
	// AppliedIndex and Lag, behind CommitIndex, are 0 for one that does not answer.
	AppliedIndex uint64 `json:"appliedIndex"`
	Lag          uint64 `json:"lag"`
	// LastContact is how long ago it answered a heartbeat, in microseconds; -1:
	// not in this term of the leader.
	LastContact int64  `json:"lastContactMicroseconds"`
	Version     string `json:"version,omitempty"`
	// Removable: the others keep a healthy quorum without it. Removal says why
	// they do not.
	Removable bool   `json:"removable"`
	Removal   string `json:"removal,omitempty"`
}

// Change is one change of the members that an operator asks for.
type Change struct {
	// Kind is ADD, PROMOTE, REMOVE or TRANSFER_LEADER.
	Kind pb.MemberChange
	// ID is the member's name; empty for TRANSFER_LEADER: whoever is up to date.
	ID string
	// Address is, for ADD, the host:port of its Raft listener; empty: where Peers
	// sees it.
	Address string
	// Force does it whatever becomes of the quorum.
	Force bool
}

// RefusedError says why a change of the members was refused.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return e.Reason }

func refuse(format string, args ...any) error {
	return &RefusedError{Reason: fmt.Sprintf(format, args...)}
}

// ListMembers asks the leader for the members. Without one it returns what this
// replica knows, and says so among Problems.
func (r *Replica) ListMembers(ctx context.Context) (MemberList, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.ProposeTimeout/2)
	defer cancel()
	var list MemberList
	err := r.onLeader(ctx, func(l *leadership) error {
		list = r.survey(ctx, l)
		return nil
	}, func(c pb.MembershipClient) error {
		a, err := c.Members(ctx, &pb.MembersRequest{ClusterId: r.cfg.ClusterID, Id: r.cfg.ID})
		if err == nil {
			list = listFromProto(a)
		}
		return err
	})
	if err == nil || r.ctx.Err() != nil {
		return list, err
	}
	list = MemberList{Problems: []string{fmt.Sprintf("no leader answers (%v): this is what %s knows; when a majority cannot come back, see docs/recovery.md", err, r.cfg.ID)}}
	for _, m := range r.Members() {
		role := "voter"
		if !m.Voter {
			role = "non-voter"
		}
		list.Members = append(list.Members, MemberInfo{ID: m.ID, Address: m.Addr, Role: role, LastContact: -1, Problem: "unknown without a leader", Removal: "no leader"})
	}
	list.finish()
	return list, nil
}

// ChangeMembers does the change on the leader and says what was done. A
// *RefusedError says why it was not; after another error it may have been:
// list the members before asking again.
func (r *Replica) ChangeMembers(ctx context.Context, change Change) (done string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*r.cfg.ProposeTimeout)
	defer cancel()
	err = r.onLeader(ctx, func(l *leadership) (err error) {
		done, err = r.changeHere(ctx, l, change)
		return err
	}, func(c pb.MembershipClient) error {
		a, err := c.ChangeMembers(ctx, &pb.ChangeMembersRequest{
			ClusterId: r.cfg.ClusterID, Id: r.cfg.ID, Change: change.Kind, Target: change.ID, Address: change.Address, Force: change.Force,
		})
		switch {
		case err != nil:
			return err
		case a.Refusal != "":
			return &RefusedError{Reason: a.Refusal}
		}
		done = a.Done
		return nil
	})
	return done, err
}

// onLeader calls here if this replica leads and there with the leader's service
// otherwise, again while these say that it does not lead any more.
func (r *Replica) onLeader(ctx context.Context, here func(*leadership) error, there func(pb.MembershipClient) error) error {
	for {
		v, err := r.waitLeader(ctx, 0)
		if err != nil {
			return err
		}
		if l := r.leads.get(); v.self {
			if err = ErrNotLeader; l != nil && l.isReady() {
				err = here(l)
			}
		} else if conn, dialErr := r.cfg.PeerConn(ctx, v.ID); dialErr != nil {
			err = fmt.Errorf("reach the leader %s: %w", v.ID, dialErr)
		} else if err = there(pb.NewMembershipClient(conn)); status.Code(err) == codes.FailedPrecondition {
			err = fmt.Errorf("%w: %v", ErrNotLeader, err)
		}
		if !errors.Is(err, ErrNotLeader) {
			return err
		}
		if pauseErr := r.pause(ctx, 20*time.Millisecond); pauseErr != nil {
			return errors.Join(err, pauseErr)
		}
	}
}

// survey asks all members how they are.
func (r *Replica) survey(ctx context.Context, l *leadership) MemberList {
	node := r.node.Load()
	list := MemberList{Leader: r.cfg.ID, Term: l.term, CommitIndex: node.CommitIndex()}
	var wg sync.WaitGroup
	servers := r.configuration()
	list.Members = make([]MemberInfo, len(servers))
	for i, s := range servers {
		m := &list.Members[i]
		m.ID, m.Address, m.Role = string(s.ID), string(s.Address), "voter"
		if s.Suffrage != raft.Voter {
			m.Role = "non-voter"
		}
		if m.ID == r.cfg.ID {
			m.Role, m.Version = "leader", r.cfg.Version
			m.AppliedIndex, _ = r.machine.position()
			if m.Healthy = true; r.DiskErr() != nil {
				m.Healthy, m.Problem = false, r.DiskErr().Error()
			}
			continue
		}
		m.LastContact = r.trans.sinceReached(s.ID)
		wg.Go(func() {
			a, err := r.hello(ctx, m.ID, pb.BootstrapStep_BOOTSTRAP_STEP_UNSPECIFIED, nil)
			if since := r.trans.sinceReached(s.ID); err != nil && since >= 0 && since < r.cfg.HeartbeatTimeout.Microseconds() {
				// It lives: the connection may be one that the network was cut off under.
				a, err = r.hello(ctx, m.ID, pb.BootstrapStep_BOOTSTRAP_STEP_UNSPECIFIED, nil)
			}
			if m.Problem = r.unfit(a, err); m.Problem == "" && m.LastContact < 0 {
				m.Problem = "no heartbeat has reached it in this term"
			}
			m.Healthy = m.Problem == ""
			if err == nil {
				m.AppliedIndex, m.Version = a.AppliedIndex, a.Version
			}
		})
	}
	wg.Wait()
	list.finish()
	return list
}

// unfit says why a member with this answer cannot be counted on; empty if it can.
func (r *Replica) unfit(a *pb.HelloResponse, err error) string {
	switch {
	case err != nil:
		return oneLine(err)
	case !a.HasState:
		return "it runs with an empty data folder and is about to join"
	case a.LeaderId != r.cfg.ID:
		return fmt.Sprintf("it does not follow this leader (it follows %q)", a.LeaderId)
	case a.DiskFailed:
		return "it cannot write its disk"
	}
	return r.tooOld(a.NewestVersion)
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// finish derives what follows from the members' roles and health.
func (l *MemberList) finish() {
	slices.SortFunc(l.Members, func(a, b MemberInfo) int { return strings.Compare(a.ID, b.ID) })
	voters := 0
	for _, m := range l.Members {
		if m.Role != "non-voter" {
			voters++
			if m.Healthy {
				l.Healthy++
			}
		}
	}
	l.Quorum = voters/2 + 1
	for i := range l.Members {
		m := &l.Members[i]
		if m.Healthy && l.CommitIndex > m.AppliedIndex {
			m.Lag = l.CommitIndex - m.AppliedIndex
		}
		if m.Removal == "" {
			m.Removal = removal(*m, voters, l.Healthy)
		}
		m.Removable = m.Removal == ""
	}
}

// removal says why a member should stay: without it, the voters left would not
// have a healthy majority. Empty: it may go.
func removal(m MemberInfo, voters, healthy int) string {
	if m.Role == "non-voter" {
		return ""
	}
	if m.Healthy {
		healthy--
	}
	left := voters - 1
	switch quorum := left/2 + 1; {
	case left == 0:
		return "it is the last voter"
	case healthy < quorum:
		return fmt.Sprintf("%d of the other %d voters are healthy, and they need %d to go on", healthy, left, quorum)
	}
	return ""
}

func (l MemberList) find(id string) (MemberInfo, error) {
	var names []string
	for _, m := range l.Members {
		if m.ID == id {
			return m, nil
		}
		names = append(names, m.ID)
	}
	return MemberInfo{}, refuse("%q is not a member: the members are %s", id, strings.Join(names, ", "))
}

// changeHere does a change on the leader: addHere, promoteHere and removeHere with
// r.members.change held.
func (r *Replica) changeHere(ctx context.Context, l *leadership, c Change) (done string, err error) {
	if c.ID == "" && c.Kind != pb.MemberChange_MEMBER_CHANGE_TRANSFER_LEADER {
		return "", refuse("name the member")
	}
	if c.Kind != pb.MemberChange_MEMBER_CHANGE_TRANSFER_LEADER {
		// What is judged is what is changed: of two removals that may each be done alone,
		// the second is judged after the first.
		if err := r.members.change.lockWithin(ctx); err != nil {
			return "", fmt.Errorf("wait for another change of the members: %w", err)
		}
		defer r.members.change.Unlock()
	}
	switch c.Kind {
	case pb.MemberChange_MEMBER_CHANGE_ADD:
		return r.addHere(ctx, c)
	case pb.MemberChange_MEMBER_CHANGE_PROMOTE:
		return r.promoteHere(ctx, l, c)
	case pb.MemberChange_MEMBER_CHANGE_REMOVE:
		return r.removeHere(ctx, l, c)
	case pb.MemberChange_MEMBER_CHANGE_TRANSFER_LEADER:
		return r.transferHere(ctx, l, c)
	}
	return "", refuse("unknown change %v", c.Kind)
}

func (r *Replica) addHere(ctx context.Context, c Change) (string, error) {
	if c.Address == "" {
		if c.Address = r.peers.get(r.cfg.Peers)[c.ID]; c.Address == "" {
			return "", refuse("%s does not run, so its address is not known: start it, or give the host:port of its Raft listener", c.ID)
		}
	}
	if err := checkHostPort(c.Address, false); err != nil {
		return "", refuse("address: %v", err)
	}
	for _, s := range r.configuration() {
		switch {
		case string(s.ID) == c.ID && (string(s.Address) == c.Address || s.Suffrage == raft.Voter):
			return fmt.Sprintf("%s is a member already, at %s.", c.ID, s.Address), nil
		case string(s.ID) != c.ID && string(s.Address) == c.Address:
			return "", refuse("%s is the address of the member %s", c.Address, s.ID)
		}
	}
	if err := r.changeLocked(ctx, func(n *raft.Raft, t time.Duration) raft.Future {
		return n.AddNonvoter(raft.ServerID(c.ID), raft.ServerAddress(c.Address), 0, t)
	}); err != nil {
		return "", fmt.Errorf("add %s: %w", c.ID, err)
	}
	r.log.Info("added a member as a non-voter, as asked", "member", c.ID, "address", c.Address)
	return fmt.Sprintf("%s is a non-voter at %s, and will vote when it has caught up.", c.ID, c.Address), nil
}

func (r *Replica) promoteHere(ctx context.Context, l *leadership, c Change) (string, error) {
	list := r.survey(ctx, l)
	m, err := list.find(c.ID)
	switch {
	case err != nil:
		return "", err
	case m.Role != "non-voter":
		return fmt.Sprintf("%s votes already.", c.ID), nil
	case !c.Force && !m.Healthy:
		return "", refuse("%s is not healthy (%s): as a voter it would count for the quorum and not help it", c.ID, m.Problem)
	case !c.Force && m.AppliedIndex+promoteWithin < list.CommitIndex:
		return "", refuse("%s lacks %d entries: wait until it has caught up", c.ID, list.CommitIndex-m.AppliedIndex)
	}
	if err := r.changeLocked(ctx, func(n *raft.Raft, t time.Duration) raft.Future {
		return n.AddVoter(raft.ServerID(c.ID), raft.ServerAddress(m.Address), 0, t)
	}); err != nil {
		return "", fmt.Errorf("promote %s: %w", c.ID, err)
	}
	r.log.Info("made a member a voter, as asked", "member", c.ID, "forced", c.Force)
	return fmt.Sprintf("%s votes now.", c.ID), nil
}

func (r *Replica) removeHere(ctx context.Context, l *leadership, c Change) (string, error) {
	list := r.survey(ctx, l)
	m, err := list.find(c.ID)
	switch {
	case err != nil:
		return "", err
	case m.Removal == "it is the last voter":
		return "", refuse("%s is the last voter: nobody would be left to commit anything; to end the cluster, stop it", c.ID)
	case m.Removal != "" && !c.Force:
		return "", refuse("without %s the cluster would stand still: %s. Bring a voter back or add one first; --force removes it all the same, and no write is possible until enough of the others are back", c.ID, m.Removal)
	}
	if c.ID == r.cfg.ID {
		// The next leader does it, so that writes hardly pause.
		if err := r.TransferLeadership(""); err != nil && !errors.Is(err, ErrNotLeader) {
			return "", fmt.Errorf("remove %s: it leads and cannot hand over: %w", c.ID, err)
		}
		return "", ErrNotLeader
	}
	if err := r.changeLocked(ctx, func(n *raft.Raft, t time.Duration) raft.Future {
		return n.RemoveServer(raft.ServerID(c.ID), 0, t)
	}); err != nil {
		return "", fmt.Errorf("remove %s: %w", c.ID, err)
	}
	r.log.Warn("removed a member, as asked", "member", c.ID, "forced", c.Force)
	done := fmt.Sprintf("%s is not a member any more.", c.ID)
	if voters := len(list.voters()) - 1; m.Role != "non-voter" && voters%2 == 0 {
		done += fmt.Sprintf(" %d voters are left, of which %d may fail: add one.", voters, (voters-1)/2)
	}
	return done, nil
}

func (l MemberList) voters() (out []MemberInfo) {
	for _, m := range l.Members {
		if m.Role != "non-voter" {
			out = append(out, m)
		}
	}
	return out
}

func (r *Replica) transferHere(ctx context.Context, l *leadership, c Change) (string, error) {
	if c.ID == r.cfg.ID {
		return fmt.Sprintf("%s leads.", c.ID), nil
	}
	list := r.survey(ctx, l)
	if c.ID != "" {
		m, err := list.find(c.ID)
		switch {
		case err != nil:
			return "", err
		case m.Role == "non-voter":
			return "", refuse("%s does not vote, and so cannot lead", c.ID)
		case !m.Healthy:
			return "", refuse("%s is not healthy: %s", c.ID, m.Problem)
		}
	} else if list.Healthy < 2 {
		return "", refuse("no other voter is healthy")
	}
	if err := r.TransferLeadership(c.ID); err != nil {
		return "", fmt.Errorf("transfer leadership: %w", err)
	}
	if c.ID == "" {
		return fmt.Sprintf("%s does not lead any more.", r.cfg.ID), nil
	}
	return fmt.Sprintf("%s leads.", c.ID), nil
}

// Members implements the Membership service.
func (s *membershipServer) Members(ctx context.Context, req *pb.MembersRequest) (*pb.MembersResponse, error) {
	if err := s.r.sameCluster(req.ClusterId, req.Id); err != nil {
		return nil, err
	}
	l := s.r.leads.get()
	if l == nil || !l.isReady() {
		return nil, status.Errorf(codes.FailedPrecondition, "replica %s does not lead", s.r.cfg.ID)
	}
	return listToProto(s.r.survey(ctx, l)), nil
}

// ChangeMembers implements the Membership service.
func (s *membershipServer) ChangeMembers(ctx context.Context, req *pb.ChangeMembersRequest) (*pb.ChangeMembersResponse, error) {
	r := s.r
	if err := r.sameCluster(req.ClusterId, req.Id); err != nil {
		return nil, err
	}
	err := ErrNotLeader
	var done string
	if l := r.leads.get(); l != nil && l.isReady() {
		done, err = r.changeHere(ctx, l, Change{Kind: req.Change, ID: req.Target, Address: req.Address, Force: req.Force})
	}
	var refused *RefusedError
	switch {
	case errors.As(err, &refused):
		return &pb.ChangeMembersResponse{Refusal: refused.Reason}, nil
	case errors.Is(err, ErrNotLeader):
		return nil, status.Errorf(codes.FailedPrecondition, "replica %s does not lead", r.cfg.ID)
	case err != nil:
		return nil, status.Error(codes.Unavailable, oneLine(err))
	}
	return &pb.ChangeMembersResponse{Done: done}, nil
}

func listToProto(l MemberList) *pb.MembersResponse {
	out := &pb.MembersResponse{LeaderId: l.Leader, Term: l.Term, CommitIndex: l.CommitIndex}
	for _, m := range l.Members {
		out.Members = append(out.Members, &pb.RaftMember{
			Id: m.ID, Address: m.Address, Voter: m.Role != "non-voter", Healthy: m.Healthy, Problem: m.Problem,
			AppliedIndex: m.AppliedIndex, Version: m.Version, LastContactMicros: m.LastContact, Removal: m.Removal,
		})
	}
	return out
}

func listFromProto(a *pb.MembersResponse) MemberList {
	l := MemberList{Leader: a.LeaderId, Term: a.Term, CommitIndex: a.CommitIndex}
	for _, m := range a.Members {
		role := "non-voter"
		switch {
		case m.Id == a.LeaderId:
			role = "leader"
		case m.Voter:
			role = "voter"
		}
		l.Members = append(l.Members, MemberInfo{
			ID: m.Id, Address: m.Address, Role: role, Healthy: m.Healthy, Problem: m.Problem,
			AppliedIndex: m.AppliedIndex, Version: m.Version, LastContact: m.LastContactMicros, Removal: m.Removal,
		})
	}
	l.finish()
	return l
}
