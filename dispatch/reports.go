package dispatch

import (
	"context"
	"fmt"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	pb "timonel/proto/timonel/v1"
)

// requestSettle is for how long a request that is forbidden is tried again.
const requestSettle = 2 * time.Second

// maxEvents bounds the events of one agent that wait to be written.
const maxEvents = 256

const (
	// maxEventBytes bounds one event; upstream's have less than 2 KiB.
	maxEventBytes = 32 << 10
	// requestBytes is what a request takes beside its message: the answer that waits.
	requestBytes = 8 << 10
)

// reports is the newest that the agent said of each thing.
type reports struct {
	mu     sync.Mutex
	node   *corev1.Node
	csi    *csiReport // nil: it said nothing of it
	pods   map[types.UID]*podReport
	events int // waiting
	serial uint64
	room   share // what all of this takes
}

// waitFor waits until there is room for n bytes that the agent said.
func (s *session) waitFor(n int) error {
	if !s.d.room.take(s.ended, &s.reports.room, int64(n)) {
		return errEnded
	}
	return nil
}

// done gives the room back.
func (s *session) done(n int64) { s.d.room.give(&s.reports.room, n) }

// podReport is the newest that the agent said of one pod.
type podReport struct {
	namespace, name string
	status          *corev1.PodStatus // nil once written
	size            int64             // of its encoding
	terminated      bool              // nothing of it runs any more
}

// isOurs reports that a pod of this node is meant. An agent hears of its pods from the
// snapshots of this replica, which it never is ahead of; what it says of others, or of
// pods that are gone, is of no use, and may be meant to fill our memory.
func (s *session) isOurs(namespace, name string, uid types.UID) bool {
	p, ok := s.d.config.Objects.Snapshot().Pods().Get(namespace, name)
	return ok && p.UID == uid && p.Spec.NodeName == s.node
}

func (s *session) reportPod(r *pb.PodStatus) error {
	uid := types.UID(r.GetUid())
	if !s.isOurs(r.GetNamespace(), r.GetName(), uid) {
		return nil
	}
	size := len(r.GetStatus())
	if err := s.waitFor(size); err != nil {
		return err
	}
	st := &corev1.PodStatus{}
	if err := st.Unmarshal(r.GetStatus()); err != nil {
		s.done(int64(size))
		return fmt.Errorf("PodStatus of %s/%s: %w", r.GetNamespace(), r.GetName(), err)
	}
	var replaced int64
	s.reportOf(r.GetNamespace(), r.GetName(), uid, func(p *podReport) {
		if p.status != nil {
			replaced = p.size
		}
		p.status, p.size = st, int64(size)
	})
	s.done(replaced)
	return nil
}

func (s *session) reportTerminated(r *pb.PodTerminated) {
	if !s.isOurs(r.GetNamespace(), r.GetName(), types.UID(r.GetUid())) {
		return
	}
	s.reportOf(r.GetNamespace(), r.GetName(), types.UID(r.GetUid()), func(p *podReport) { p.terminated = true })
}

func (s *session) reportOf(namespace, name string, uid types.UID, change func(*podReport)) {
	s.reports.mu.Lock()
	if s.reports.pods == nil {
		s.reports.pods = make(map[types.UID]*podReport)
	}
	p := s.reports.pods[uid]
	if p == nil {
		p = &podReport{namespace: namespace, name: name}
		s.reports.pods[uid] = p
	}
	change(p)
	s.reports.mu.Unlock()
	s.writer.add("pod "+namespace+"/"+name+" "+string(uid), func(ctx context.Context) error { return s.writePod(ctx, uid) })
}

// writePod writes a pod's newest status, then deletes the pod if nothing of it
// runs any more.
func (s *session) writePod(ctx context.Context, uid types.UID) error {
	s.reports.mu.Lock()
	p := s.reports.pods[uid]
	if p == nil {
		s.reports.mu.Unlock()
		return nil
	}
	report := *p
	s.reports.mu.Unlock()

	if report.status != nil {
		err := s.writePodStatus(ctx, report, uid)
		// A pod that is gone, or that validation refuses, must not keep the node
		// from letting go of it.
		refused := err != nil && !mayPass(err, settleTime)
		if err != nil && !(report.terminated && refused) {
			if refused {
				s.wrote(p, report, uid)
			}
			return err
		}
	}
	if report.terminated {
		if err := s.deletePod(ctx, report, uid); err != nil {
			return err
		}
	}
	s.wrote(p, report, uid)
	return nil
}

// wrote forgets what was taken as report, and is written or never will be.
func (s *session) wrote(p *podReport, report podReport, uid types.UID) {
	var written int64
	s.reports.mu.Lock()
	if p.status == report.status && p.status != nil {
		p.status, written = nil, p.size
	}
	if p.status == nil && p.terminated == report.terminated {
		delete(s.reports.pods, uid)
	}
	s.reports.mu.Unlock()
	s.done(written)
}

func (s *session) writePodStatus(ctx context.Context, p podReport, uid types.UID) error {
	live, ok := s.d.config.Objects.Snapshot().Pods().Get(p.namespace, p.name)
	for try := 0; ; try++ {
		if !ok || try > 0 {
			var err error
			live, err = s.client.Pods(p.namespace).Get(ctx, p.name, metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("read pod %s/%s: %w", p.namespace, p.name, err)
			}
		}
		if live.UID != uid {
			if ok && try == 0 {
				continue // the snapshot may be behind
			}
			return nil // another pod of the same name
		}
		next := mergePodStatus(&live.Status, p.status)
		if apiequality.Semantic.DeepEqual(&live.Status, next) {
			return nil
		}
		pod := live.DeepCopy()
		pod.Status = *next
		_, err := s.client.Pods(p.namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{})
		if apierrors.IsConflict(err) && try < 3 {
			continue
		}
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("write status of pod %s/%s: %w", p.namespace, p.name, err)
		}
		return nil
	}
}

// mergePodStatus is what the agent says, with what only others may say kept.
func mergePodStatus(live, said *corev1.PodStatus) *corev1.PodStatus {
	next := said.DeepCopy()
	if finished(live.Phase) && !finished(next.Phase) {
		next.Phase = live.Phase // a pod that ended does not come back
	}
	if next.NominatedNodeName == "" {
		next.NominatedNodeName = live.NominatedNodeName
	}
	if next.QOSClass == "" {
		next.QOSClass = live.QOSClass
	}
	if next.StartTime == nil {
		next.StartTime = live.StartTime
	}
	if next.ResourceClaimStatuses == nil {
		next.ResourceClaimStatuses = live.ResourceClaimStatuses
	}
	for _, c := range live.Conditions {
		if !has(next.Conditions, func(n corev1.PodCondition) bool { return n.Type == c.Type }) {
			next.Conditions = append(next.Conditions, c)
		}
	}
	for i := range next.Conditions {
		n := &next.Conditions[i]
		for _, c := range live.Conditions {
			if c.Type == n.Type && c.Status == n.Status {
				n.LastTransitionTime = c.LastTransitionTime
			}
		}
	}
	return next
}

func finished(p corev1.PodPhase) bool { return p == corev1.PodSucceeded || p == corev1.PodFailed }

func has[T any](list []T, is func(T) bool) bool {
	for _, t := range list {
		if is(t) {
			return true
		}
	}
	return false
}

func (s *session) deletePod(ctx context.Context, p podReport, uid types.UID) error {
	now := int64(0)
	err := s.client.Pods(p.namespace).Delete(ctx, p.name, metav1.DeleteOptions{
		GracePeriodSeconds: &now, Preconditions: &metav1.Preconditions{UID: &uid},
	})
	if apierrors.IsConflict(err) {
		if live, getErr := s.client.Pods(p.namespace).Get(ctx, p.name, metav1.GetOptions{}); getErr == nil && live.UID != uid {
			return nil // another pod of the same name
		}
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete terminated pod %s/%s: %w", p.namespace, p.name, err)
	}
	return nil
}

// reportEvent writes an event. When too many wait, it is dropped: events are a
// courtesy.
func (s *session) reportEvent(e *corev1.Event, size int) error {
	s.reports.mu.Lock()
	if s.reports.events >= maxEvents || size > maxEventBytes {
		s.reports.mu.Unlock()
		return nil
	}
	s.reports.events++
	s.reports.serial++
	serial := s.reports.serial
	s.reports.mu.Unlock()
	if err := s.waitFor(size); err != nil {
		return err
	}

	if e.Namespace == "" {
		e.Namespace = e.InvolvedObject.Namespace
	}
	if e.Namespace == "" {
		e.Namespace = metav1.NamespaceDefault
	}
	if e.Name == "" {
		e.Name = fmt.Sprintf("%s.%x%04x", e.InvolvedObject.Name, time.Now().UnixNano(), serial&0xffff)
	}
	e.ResourceVersion = ""
	var once sync.Once
	done := func() {
		once.Do(func() {
			s.reports.mu.Lock()
			s.reports.events--
			s.reports.mu.Unlock()
			s.done(int64(size))
		})
	}
	s.writer.add(fmt.Sprintf("event %d", serial), func(ctx context.Context) error {
		_, err := s.client.Events(e.Namespace).Create(ctx, e, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) || apierrors.IsNotFound(err) { // the namespace is gone, or going
			err = nil
		}
		if err == nil || !mayPass(err, 0) {
			done()
		}
		return err
	})
	return nil
}

// request answers something that the agent asks for as its node.
func (s *session) request(r *pb.Request, size int) error {
	start := time.Now()
	size += requestBytes
	if err := s.waitFor(size); err != nil {
		return err
	}
	var once sync.Once
	s.writer.add(fmt.Sprintf("request %d", r.GetId()), func(ctx context.Context) error {
		reply := &pb.Reply{Id: r.GetId()}
		body, err := s.answer(ctx, r)
		if err != nil {
			// The API server hears of a pod's node, and of who is who, a moment after we do.
			behind := apierrors.IsForbidden(err) || apierrors.IsInternalError(err)
			if ctx.Err() != nil || behind && time.Since(start) < requestSettle {
				return err
			}
			st := apierrors.NewInternalError(err).ErrStatus
			if answer, ok := err.(apierrors.APIStatus); ok {
				st = answer.Status()
			}
			if reply.Status, err = st.Marshal(); err != nil {
				return fmt.Errorf("encode status: %w", err)
			}
		} else {
			reply.Body = body
		}
		once.Do(func() { s.done(int64(size)) })
		_ = s.tell(&pb.ControllerMessage{Message: &pb.ControllerMessage_Reply{Reply: reply}}) // ends the session if it fails
		return nil
	})
	return nil
}

func (s *session) answer(ctx context.Context, r *pb.Request) ([]byte, error) {
	switch q := r.GetRequest().(type) {
	case *pb.Request_Token:
		in := &authenticationv1.TokenRequest{}
		if err := in.Unmarshal(q.Token.GetTokenRequest()); err != nil {
			return nil, apierrors.NewBadRequest("decode TokenRequest: " + err.Error())
		}
		out, err := s.client.ServiceAccounts(q.Token.GetNamespace()).CreateToken(ctx, q.Token.GetServiceAccount(), in, metav1.CreateOptions{})
		if err != nil {
			return nil, err
		}
		return out.Marshal()
	case *pb.Request_PodCertificate:
		return nil, s.requestCertificate(ctx, q.PodCertificate)
	case *pb.Request_ClaimGrown:
		return nil, s.growClaim(ctx, q.ClaimGrown)
	}
	return nil, apierrors.NewBadRequest(fmt.Sprintf("this controller does not know the request %T; it may be older than the agent", r.GetRequest()))
}
