package apiserver

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync/atomic"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/endpoints/request"

	"timonel/internal/fair"
)

const (
	// tunnelCost is what a client that reads nothing keeps of a node's answer: a window of
	// the stream from the node, and buffers.
	tunnelCost = 512 << 10
	// leastTunnelBytes is the least bound of what they keep.
	leastTunnelBytes = 64 << 20
	// maxAnswerHead is how long the head of a node's answer may be, and the whole of one that
	// does not become a stream although that was asked for.
	maxAnswerHead = 256 << 10
)

// tunneled are the subresources of pods that are streams from a node. Neither upstream's
// priority and fairness nor its time limits hold for them, as they may last.
var tunneled = []string{"attach", "exec", "log", "portforward"}

// nodeStreams bounds how many streams from nodes are open: any may be of a client that does
// not read what its container writes as fast as it can. One user, or all service accounts of
// a namespace, have half of them at most. Those of system:masters are not counted, as for
// priority and fairness.
type nodeStreams struct {
	room       *fair.Room
	serializer runtime.NegotiatedSerializer
	refused    atomic.Uint64
}

func newNodeStreams(limit int64) *nodeStreams {
	return &nodeStreams{room: fair.New(max(limit, leastTunnelBytes), 0)}
}

// after is behind authorization.
func (n *nodeStreams) after(next http.Handler) http.Handler {
	now, cancel := context.WithCancel(context.Background())
	cancel() // who finds no room does not wait
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info, ok := request.RequestInfoFrom(r.Context())
		if !ok || !info.IsResourceRequest || info.APIGroup != "" || info.Resource != "pods" || !slices.Contains(tunneled, info.Subresource) {
			next.ServeHTTP(w, r)
			return
		}
		if u, ok := request.UserFrom(r.Context()); ok && slices.Contains(u.GetGroups(), user.SystemPrivilegedGroup) {
			next.ServeHTTP(w, r)
			return
		}
		who, _ := bodySource(r)
		give, err := n.room.Take(now, who, tunnelCost)
		if err != nil {
			n.refused.Add(1)
			responsewriters.ErrorNegotiated(apierrors.NewTooManyRequests("Too many logs, commands and forwarded ports of yours, or of all, are open on this API server: close some, or try again later.", 5),
				n.serializer, schema.GroupVersion{}, w, r)
			return
		}
		defer give()
		next.ServeHTTP(w, r)
	})
}

// headed bounds the answer of a node to who wants to speak another protocol with it: all that
// comes before it agrees. Upstream reads that with no bound.
type headed struct {
	net.Conn
	node string

	asked   []byte // the last of the request, so far
	upgrade bool   // the request wants another protocol
	sent    bool   // the head of the request is out
	line    []byte // the first line of the answer, then the last bytes of its head
	status  bool   // the first line is known
	agreed  bool   // it is 101
	done    bool   // nothing is looked at any more
	left    int64
}

func newHeaded(conn net.Conn, node string) net.Conn {
	return &headed{Conn: conn, node: node, left: maxAnswerHead}
}

// Write implements net.Conn, for one writer.
func (h *headed) Write(p []byte) (int, error) {
	if !h.sent {
		h.asked = append(h.asked, p...)
		lower := bytes.ToLower(h.asked)
		h.upgrade = h.upgrade || bytes.Contains(lower, []byte("\r\nupgrade:"))
		h.sent = bytes.Contains(h.asked, []byte("\r\n\r\n"))
		if keep := len("\r\nupgrade:"); len(h.asked) > keep {
			h.asked = slices.Clone(h.asked[len(h.asked)-keep:])
		}
		if h.sent {
			h.asked = nil
		}
	}
	return h.Conn.Write(p)
}

// Read implements net.Conn, for one reader, who reads after the request was written.
func (h *headed) Read(p []byte) (int, error) {
	if h.done {
		return h.Conn.Read(p)
	}
	if h.left <= 0 {
		return 0, fmt.Errorf("node %s answers with more than %d bytes and no stream", h.node, maxAnswerHead)
	}
	if int64(len(p)) > h.left {
		p = p[:h.left]
	}
	n, err := h.Conn.Read(p)
	h.left -= int64(n)
	h.look(p[:n])
	return n, err
}

// look finds the end of an answer's head.
func (h *headed) look(p []byte) {
	if !h.upgrade {
		h.done = true // the transport bounds the head, and what follows is passed on
		h.line = nil
		return
	}
	h.line = append(h.line, p...)
	if !h.status {
		end := bytes.IndexByte(h.line, '\n')
		if end < 0 {
			return
		}
		h.status = true
		fields := bytes.Fields(h.line[:end])
		h.agreed = len(fields) > 1 && string(fields[1]) == "101"
	}
	if h.agreed && (bytes.Contains(h.line, []byte("\r\n\r\n")) || bytes.Contains(h.line, []byte("\n\n"))) {
		h.done, h.line = true, nil
		return
	}
	if len(h.line) > 3 {
		h.line = slices.Clone(h.line[len(h.line)-3:])
	}
}
