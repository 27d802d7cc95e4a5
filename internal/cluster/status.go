package cluster

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"timonel/internal/machines"
	"timonel/pki"
	timonelv1 "timonel/proto/timonel/v1"
)

// Status is what a cluster is doing.
type Status struct {
	Cluster     string             `json:"cluster"`
	ClusterID   string             `json:"clusterID"`
	Kubeconfig  string             `json:"kubeconfig"`
	API         string             `json:"api"`
	Leader      string             `json:"leader"` // that most controllers follow; empty: none
	Term        uint64             `json:"term"`
	Version     uint32             `json:"clusterVersion"` // which formats are written; 0: unknown
	Controllers []ControllerStatus `json:"controllers"`
	Nodes       []NodeStatus       `json:"nodes"`
	Pods        PodCounts          `json:"pods"`
	Cuts        []string           `json:"cuts"` // links that `partition` cut
	// Expiries are in the order in which things expire. Of nodes and of join tokens
	// the first are named, and the others counted in one.
	Expiries []Expiry `json:"expiries"`
	Problems []string `json:"problems"`
}

// MachineStatus says what of a machine runs.
type MachineStatus struct {
	Name    string    `json:"name"`
	Address string    `json:"address"`
	State   string    `json:"state"` // running, paused, ended, off
	Pid     int       `json:"pid,omitempty"`
	Started time.Time `json:"started,omitzero"`
	Exited  string    `json:"exited,omitempty"`
}

// ControllerStatus is what a controller says of itself.
type ControllerStatus struct {
	MachineStatus
	Answers bool   `json:"answers"`
	Version string `json:"version,omitempty"`
	// ClusterVersion says which formats the cluster writes, NewestVersion which this
	// controller's program knows.
	ClusterVersion uint32          `json:"clusterVersion,omitempty"`
	NewestVersion  uint32          `json:"newestVersion,omitempty"`
	Role           string          `json:"role,omitempty"`
	Leader         string          `json:"leader,omitempty"`
	Term           uint64          `json:"term,omitempty"`
	CommitIndex    uint64          `json:"commitIndex,omitempty"`
	AppliedIndex   uint64          `json:"appliedIndex,omitempty"`
	LastIndex      uint64          `json:"lastIndex,omitempty"`
	Revision       int64           `json:"revision,omitempty"`
	Fsync          time.Duration   `json:"fsyncNanoseconds,omitempty"`
	Agents         []string        `json:"agents"`
	Members        []MemberStatus  `json:"members"`
	Memory         machines.Memory `json:"memory"`
	Expiries       []Expiry        `json:"-"` // see Status
	Problems       []string        `json:"problems"`
}

// MemberStatus is how a controller sees a member of the gossip pool.
type MemberStatus struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Role    string `json:"role"`
	State   string `json:"state"`
}

// NodeStatus is an agent's machine and its Node.
type NodeStatus struct {
	MachineStatus
	Ready    bool   `json:"ready"`
	Reason   string `json:"reason,omitempty"`
	Version  string `json:"version,omitempty"`
	PodCIDR  string `json:"podCIDR,omitempty"`
	Pods     int    `json:"pods"`
	StreamTo string `json:"streamTo,omitempty"` // the controller it is connected to
}

// PodCounts counts pods.
type PodCounts struct {
	Total   int `json:"total"`
	Ready   int `json:"ready"`
	Pending int `json:"pending"`
	Failed  int `json:"failed"`
}

// Status asks every controller and the API. What does not answer is a part of
// the status, not an error.
func (s *Spec) Status(ctx context.Context) (*Status, error) {
	bundle, err := pki.LoadBundle(s.BundleDir())
	if err != nil {
		return nil, err
	}
	// Peers.Status is for controllers; who has the bundle may be one.
	operator, err := bundle.Controller("timonel-status", nil, nil)
	if err != nil {
		return nil, err
	}
	secure := credentials.NewTLS(operator.ClusterClientTLS())
	status := &Status{Cluster: s.Name, ClusterID: bundle.ClusterID(), Kubeconfig: s.Kubeconfig(),
		API: "https://" + s.ProxyAddress(), Controllers: make([]ControllerStatus, s.Controllers)}
	var group sync.WaitGroup
	for i, name := range s.ControllerNames() {
		group.Go(func() { status.Controllers[i] = s.controllerStatus(ctx, name, secure) })
	}
	var fromAPI error
	group.Go(func() { fromAPI = s.fromAPI(ctx, status) })
	group.Wait()
	if fromAPI != nil {
		status.Problems = append(status.Problems, "nodes and pods are unknown: "+fromAPI.Error())
	}
	if !s.Proxy.Alive() {
		status.Problems = append(status.Problems, "the load balancer does not run: `timonel up` starts it")
	}
	if status.Cuts, err = s.Network().Cuts(); err != nil {
		status.Problems = append(status.Problems, err.Error())
	}
	status.summarize()
	if admin, ok := kubeconfigExpiry(s.Kubeconfig()); ok {
		status.Expiries = append(status.Expiries, admin)
	}
	status.expiries()
	status.Problems = append(status.Problems, expiryProblems(status.Expiries, time.Now())...)
	return status, nil
}

// summarize derives who leads, and says where controllers disagree.
func (s *Status) summarize() {
	votes := map[string]int{}
	answers := 0
	for _, c := range s.Controllers {
		if !c.Answers {
			continue
		}
		answers++
		s.Term, s.Version = max(s.Term, c.Term), max(s.Version, c.ClusterVersion)
		votes[c.Leader]++
		for _, agent := range c.Agents {
			for i := range s.Nodes {
				if s.Nodes[i].Name == agent {
					s.Nodes[i].StreamTo = c.Name
				}
			}
		}
		for _, problem := range c.Problems {
			s.Problems = append(s.Problems, c.Name+": "+problem)
		}
	}
	for leader, count := range votes {
		if leader != "" && count > len(s.Controllers)/2 {
			s.Leader = leader
		}
	}
	if answers <= len(s.Controllers)/2 {
		s.Problems = append(s.Problems, fmt.Sprintf("%d of %d controllers answer: no majority, no writes", answers, len(s.Controllers)))
	} else if s.Leader == "" {
		s.Problems = append(s.Problems, "no majority follows the same leader: an election is on, or links are cut")
	}
}

func (s *Spec) machineStatus(ctx context.Context, name string) MachineStatus {
	m := MachineStatus{Name: name, Address: s.Address(name).String(), State: "off"}
	state, err := s.Machine(name).State(ctx)
	switch {
	case err != nil:
		m.State, m.Exited = "unknown", err.Error()
	case state.Paused:
		m.State = "paused"
	case state.Up():
		m.State = "running"
	case state.On:
		m.State, m.Exited = "ended", state.Exited
	}
	m.Pid = state.Main.Pid
	m.Started = state.Started
	return m
}

func (s *Spec) controllerStatus(ctx context.Context, name string, secure credentials.TransportCredentials) ControllerStatus {
	c := ControllerStatus{MachineStatus: s.machineStatus(ctx, name)}
	if c.Pid != 0 {
		memory, err := machines.ReadMemory(c.Pid)
		if err != nil {
			c.Problems = append(c.Problems, err.Error())
		}
		c.Memory = memory
	}
	if c.State != "running" {
		return c
	}
	ctx, cancel := context.WithTimeout(ctx, attempt)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///"+s.ClusterAddress(name), grpc.WithTransportCredentials(secure))
	if err != nil {
		c.Problems = append(c.Problems, err.Error())
		return c
	}
	defer conn.Close()
	r, err := timonelv1.NewPeersClient(conn).Status(ctx, &timonelv1.StatusRequest{})
	if err != nil {
		c.Problems = append(c.Problems, "does not answer: "+err.Error())
		return c
	}
	c.Answers, c.Version, c.Role, c.Leader, c.Term = true, r.GetVersion(), r.GetRole(), r.GetLeader(), r.GetTerm()
	c.CommitIndex, c.AppliedIndex, c.LastIndex = r.GetCommitIndex(), r.GetAppliedIndex(), r.GetLastIndex()
	c.Revision, c.Agents, c.Problems = r.GetRevision(), r.GetAgents(), r.GetProblems()
	c.Expiries = expiriesOf(r.GetExpiries())
	c.ClusterVersion, c.NewestVersion = r.GetClusterVersion(), r.GetNewestVersion()
	c.Fsync = time.Duration(r.GetFsyncMicroseconds()) * time.Microsecond
	for _, m := range r.GetMembers() {
		c.Members = append(c.Members, MemberStatus{m.GetName(), m.GetAddress(), m.GetRole(), m.GetState()})
	}
	slices.SortFunc(c.Members, func(a, b MemberStatus) int {
		return cmp.Or(-strings.Compare(a.Role, b.Role), strings.Compare(a.Name, b.Name))
	})
	return c
}

// fromAPI fills in nodes and pods.
func (s *Spec) fromAPI(ctx context.Context, status *Status) error {
	for _, name := range s.AgentNames() {
		status.Nodes = append(status.Nodes, NodeStatus{MachineStatus: s.machineStatus(ctx, name), Reason: "unknown to the API"})
	}
	c, err := newClient(s)
	if err != nil {
		return err
	}
	var nodes *corev1.NodeList
	var pods *corev1.PodList
	err = c.any(func(set *kubernetes.Clientset) (err error) {
		if nodes, err = set.CoreV1().Nodes().List(ctx, metav1.ListOptions{}); err != nil {
			return err
		}
		pods, err = set.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
		return err
	})
	if err != nil {
		return err
	}
	for _, node := range nodes.Items {
		i := slices.IndexFunc(status.Nodes, func(n NodeStatus) bool { return n.Name == node.Name })
		if i < 0 {
			status.Nodes = append(status.Nodes, NodeStatus{MachineStatus: MachineStatus{Name: node.Name, State: "elsewhere"}})
			i = len(status.Nodes) - 1
		}
		n := &status.Nodes[i]
		n.Ready, n.Reason = nodeReady(&node)
		n.Version, n.PodCIDR = node.Status.NodeInfo.KubeletVersion, node.Spec.PodCIDR
	}
	for _, pod := range pods.Items {
		status.Pods.Total++
		switch {
		case pod.Status.Phase == corev1.PodPending:
			status.Pods.Pending++
		case pod.Status.Phase == corev1.PodFailed:
			status.Pods.Failed++
		case podReady(&pod):
			status.Pods.Ready++
		}
		if i := slices.IndexFunc(status.Nodes, func(n NodeStatus) bool { return n.Name == pod.Spec.NodeName }); i >= 0 {
			status.Nodes[i].Pods++
		}
	}
	return nil
}

func podReady(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}
