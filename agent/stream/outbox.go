package stream

import (
	"fmt"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	pb "timonel/proto/timonel/v1"
)

// maxEvents bounds the events that wait for a controller.
const maxEvents = 256

// outbox holds what is to be sent. Of status only the newest counts, so a slow
// or absent controller costs no memory beyond one status a pod.
type outbox struct {
	mu         sync.Mutex
	node       *corev1.Node
	nodeDirty  bool
	statuses   map[types.UID]*pb.PodStatus
	terminated map[types.UID]*pb.PodTerminated
	dirty      []types.UID // statuses and terminated to send, in order
	isDirty    map[types.UID]bool
	events     []*corev1.Event
	requests   []*pb.Request
	usage      *pb.UsageReport
	csiNode    *pb.CSINodeReport
	csiDirty   bool
	kept       []string // names of keys of gossip, to say so
	wake       chan struct{}
}

func newOutbox() *outbox {
	return &outbox{
		statuses: map[types.UID]*pb.PodStatus{}, terminated: map[types.UID]*pb.PodTerminated{},
		isDirty: map[types.UID]bool{}, wake: make(chan struct{}, 1),
	}
}

func (o *outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *outbox) mark(uid types.UID) {
	if !o.isDirty[uid] {
		o.isDirty[uid] = true
		o.dirty = append(o.dirty, uid)
	}
	o.signal()
}

func (o *outbox) setNode(node *corev1.Node) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.node, o.nodeDirty = node, true
	o.signal()
}

// setStatus takes a pod's newest status. It returns an error for one that no
// controller takes: that is not sent, as it would end the stream for all others.
func (o *outbox) setStatus(pod *corev1.Pod, status *corev1.PodStatus) error {
	raw, err := status.Marshal()
	if err != nil {
		return err
	}
	if len(raw) > pb.MaxStatus {
		return fmt.Errorf("it has %d bytes, controllers take %d", len(raw), pb.MaxStatus)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.statuses[pod.UID] = &pb.PodStatus{Namespace: pod.Namespace, Name: pod.Name, Uid: string(pod.UID), Status: raw}
	o.mark(pod.UID)
	return nil
}

func (o *outbox) setTerminated(pod *corev1.Pod) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.terminated[pod.UID] = &pb.PodTerminated{Namespace: pod.Namespace, Name: pod.Name, Uid: string(pod.UID)}
	o.mark(pod.UID)
}

func (o *outbox) forget(uid types.UID) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.statuses, uid)
	delete(o.terminated, uid)
}

func (o *outbox) addEvent(e *corev1.Event) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.events) >= maxEvents {
		o.events = o.events[1:]
	}
	o.events = append(o.events, e)
	o.signal()
}

// setUsage takes what the node takes now. It is sent to whoever is connected by then.
func (o *outbox) setUsage(u *pb.UsageReport) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.usage = u
	o.signal()
}

// setCSINode takes which CSI drivers the node has. Each controller is told of it.
func (o *outbox) setCSINode(r *pb.CSINodeReport) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.csiNode, o.csiDirty = r, true
	o.signal()
}

// setKept queues the names of the keys of gossip that are kept.
func (o *outbox) setKept(ids []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.kept = ids
	o.signal()
}

func (o *outbox) addRequest(r *pb.Request) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.requests = append(o.requests, r)
	o.signal()
}

// hello returns the node for a Hello and makes every status due again: the
// controller now talked to may not have heard them.
func (o *outbox) hello() *corev1.Node {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.nodeDirty = false
	o.requests, o.kept = nil, nil
	if o.csiNode != nil {
		o.csiDirty = true
		o.signal()
	}
	for uid := range o.statuses {
		o.mark(uid)
	}
	for uid := range o.terminated {
		o.mark(uid)
	}
	return o.node
}

// take returns all that is due, in the order it is to be sent.
func (o *outbox) take() []*pb.AgentMessage {
	o.mu.Lock()
	defer o.mu.Unlock()
	var out []*pb.AgentMessage
	if o.nodeDirty {
		if raw, err := o.node.Marshal(); err == nil {
			out = append(out, &pb.AgentMessage{Message: &pb.AgentMessage_NodeStatus{NodeStatus: &pb.NodeStatus{Node: raw}}})
		}
		o.nodeDirty = false
	}
	if o.csiDirty {
		out = append(out, &pb.AgentMessage{Message: &pb.AgentMessage_CsiNode{CsiNode: o.csiNode}})
		o.csiDirty = false
	}
	if o.kept != nil {
		out = append(out, &pb.AgentMessage{Message: &pb.AgentMessage_GossipKeysKept{GossipKeysKept: &pb.GossipKeysKept{Ids: o.kept}}})
		o.kept = nil
	}
	if o.usage != nil {
		out = append(out, &pb.AgentMessage{Message: &pb.AgentMessage_Usage{Usage: o.usage}})
		o.usage = nil
	}
	for _, r := range o.requests {
		out = append(out, &pb.AgentMessage{Message: &pb.AgentMessage_Request{Request: r}})
	}
	for _, uid := range o.dirty {
		if s := o.statuses[uid]; s != nil {
			out = append(out, &pb.AgentMessage{Message: &pb.AgentMessage_PodStatus{PodStatus: s}})
		}
		if t := o.terminated[uid]; t != nil {
			out = append(out, &pb.AgentMessage{Message: &pb.AgentMessage_PodTerminated{PodTerminated: t}})
		}
	}
	for _, e := range o.events {
		if raw, err := e.Marshal(); err == nil {
			out = append(out, &pb.AgentMessage{Message: &pb.AgentMessage_Event{Event: &pb.Event{Event: raw}}})
		}
	}
	o.requests, o.dirty, o.events = nil, nil, nil
	clear(o.isDirty)
	return out
}
