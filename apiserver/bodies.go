package apiserver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/apis/discovery"

	"timonel/internal/fair"
	"timonel/internal/weigh"
)

const (
	// leastBodyBytes is the least bound of what bodies take.
	leastBodyBytes = 96 << 20
	// smallBody is how large a body may be that needs not wait for large ones.
	smallBody = 64 << 10
	// unreadBody is what HTTP/2 keeps of a body that nobody reads.
	unreadBody = 256 << 10
	// bodyPatience is for how long a request waits for room.
	bodyPatience = 10 * time.Second
	// A body has slowestBody bytes in a second to come, and slowestStart beside.
	slowestBody  = 64 << 10
	slowestStart = 10 * time.Second
	// mostBodyWaiters is how many wait for room at most. What waits has up to unreadBody in
	// HTTP/2's buffers.
	mostBodyWaiters = 128
	// largeHead is how large a request without its body may be that needs no room, and
	// headFactor how much larger it is in memory.
	largeHead  = 16 << 10
	headFactor = 4
	// largeSelector is how large selectors may be that need no room, and selectorFactor how
	// much larger others are in memory, as measured with "a!=x1,a!=x2,…", while they are
	// parsed and for as long as a watch has them.
	largeSelector  = 512
	selectorFactor = 128
	// mostValues is how many values an object of a built-in kind may have. Upstream's
	// validation compares each error with all others, beyond any deadline: a list of a
	// million empty containers keeps a processor busy for days, so many values some
	// seconds, less than the deadline up to which the request has a seat.
	mostValues = 16 << 10
)

// bodies bounds what the bodies of requests take in memory, all together: while they come,
// and as objects. Upstream bounds their number, hundreds, and the size of each, 3 MiB, of
// which a list of a million empty containers takes gigabytes.
//
// A body is read before the request has a seat of priority and fairness, so one that comes
// slowly takes nobody's; then it is estimated what it takes when decoded, and the request
// goes on when there is room for that, until its handler has returned. There is room for
// bodies that come, of which small ones have a part of their own, and room for decoded
// ones: who has the latter waits for nobody, so the former gets free too. Of each half is
// for the most that one user, or one namespace's service accounts, can have.
type bodies struct {
	most         int64 // of one body, upstream's
	small, large *fair.Room
	decoded      *fair.Room
	selectors    *fair.Room // for as long as a watch
	serializer   runtime.NegotiatedSerializer
	longRunning  func(*http.Request, *request.RequestInfo) bool
}

func newBodies(limit int64) *bodies {
	limit = max(limit, leastBodyBytes)
	room := func(n int64) *fair.Room { return fair.New(n, mostBodyWaiters) }
	return &bodies{small: room(limit / 16), large: room(limit / 16 * 3), decoded: room(limit / 16 * 11), selectors: room(limit / 16)}
}

// bytes is what bodies take, and how many were refused for that there was no room.
func (b *bodies) bytes() (held int64, refused uint64) {
	for _, r := range []*fair.Room{b.small, b.large, b.decoded, b.selectors} {
		s := r.Stats()
		held, refused = held+s.Held, refused+s.Refused
	}
	return held, refused
}

// after is behind authentication and in front of priority and fairness.
func (b *bodies) after(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if connOf(r) == nil || !hasBody(r) && headSize(r) <= largeHead && selectorSize(r) == 0 {
			next.ServeHTTP(w, r)
			return
		}
		release, err := b.take(r)
		defer release()
		if err != nil {
			responsewriters.ErrorNegotiated(err, b.serializer, schema.GroupVersion{}, w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func hasBody(r *http.Request) bool {
	return r.Body != nil && r.Body != http.NoBody && r.ContentLength != 0
}

// headSize is about how large a request is without its body.
func headSize(r *http.Request) int64 {
	n := len(r.RequestURI)
	for name, values := range r.Header {
		n += len(name) + 32
		for _, v := range values {
			n += len(v) + 16
		}
	}
	return int64(n)
}

// selectorSize is how large the selectors of a request may be, 0 for small ones.
func selectorSize(r *http.Request) int64 {
	if n := len(r.URL.RawQuery); n > largeSelector && strings.Contains(r.URL.RawQuery, "elector") {
		return int64(n)
	}
	return 0
}

// take reads the body and waits until there is room for what it says. What it has taken is
// given back by release, also when there is an error.
func (b *bodies) take(r *http.Request) (release func(), err error) {
	var held []func()
	release = func() {
		for _, give := range held {
			give()
		}
	}
	who, known := bodySource(r)
	ctx, cancel := context.WithTimeout(r.Context(), bodyPatience)
	defer cancel()
	hold := func(room *fair.Room, n int64) error {
		give, err := room.Take(ctx, who, n)
		if err != nil {
			return apierrors.NewTooManyRequests("Too much is being sent to this API server, please try again later.", 1)
		}
		held = append(held, give)
		return nil
	}
	if n := headSize(r); n > largeHead {
		if err := hold(b.large, headFactor*n); err != nil {
			return release, err
		}
	}
	if n := selectorFactor * selectorSize(r); n > b.selectors.Limit() {
		return release, apierrors.NewRequestEntityTooLargeError(fmt.Sprintf("the selectors would take some %d MiB of memory, and %d MiB are for those of all requests", n>>20, b.selectors.Limit()>>20))
	} else if n > 0 {
		if err := hold(b.selectors, n); err != nil {
			return release, err
		}
	}
	if !hasBody(r) {
		return release, nil
	}
	info, ok := request.RequestInfoFrom(r.Context())
	if !known || ok && b.longRunning(r, info) { // one that is passed on, or that waits
		return release, hold(b.large, unreadBody)
	}
	size := r.ContentLength
	if size < 0 || size > b.most {
		size = b.most
	}
	coming := b.large
	if size <= smallBody {
		coming = b.small
	}
	if err := hold(coming, size); err != nil {
		return release, err
	}
	if r.ContentLength > b.most {
		return release, nil // the handler says so
	}
	body, whole, err := b.read(r, size)
	if err != nil {
		return release, err
	}
	if !whole {
		return release, nil // likewise
	}
	values, cost := estimate(body, r.Header.Get("Content-Type"))
	if values > mostValues && ok && validatedAtLength(info) {
		return release, apierrors.NewRequestEntityTooLargeError(fmt.Sprintf("it has %d values, and the most that an object of this kind may have are %d", values, mostValues))
	}
	if cost > b.decoded.Limit() {
		return release, apierrors.NewRequestEntityTooLargeError(fmt.Sprintf(
			"it has so many values that it would take some %d MiB of memory, and %d MiB are for requests: send less at once, or give the controllers more --memory",
			cost>>20, b.decoded.Limit()>>20))
	}
	return release, hold(b.decoded, cost)
}

// bodySource is who sends a request: a user, or the service accounts of a namespace, of
// which anybody who can make one can make many. It is not known of anonymous ones, of which
// nothing is read before they are authorized.
func bodySource(r *http.Request) (who string, known bool) {
	u, ok := request.UserFrom(r.Context())
	if !ok || u.GetName() == user.Anonymous {
		return user.Anonymous, false
	}
	if namespace, _, err := serviceaccount.SplitUsername(u.GetName()); err == nil {
		return serviceaccount.ServiceAccountUsernamePrefix + namespace, true
	}
	return u.GetName(), true
}

// read reads the body, for as long as a slow client may take, and has the handler read what
// was read. It is not whole if it is larger than a body may be.
func (b *bodies) read(r *http.Request, size int64) (_ []byte, whole bool, err error) {
	wait := slowestStart + time.Duration(size/slowestBody)*time.Second
	late := time.AfterFunc(wait, func() { endBody(r) })
	var read []byte
	if r.ContentLength >= 0 {
		read = make([]byte, size)
		_, err = io.ReadFull(r.Body, read)
		whole = true
	} else {
		read, err = io.ReadAll(io.LimitReader(r.Body, b.most+1))
		whole = int64(len(read)) <= b.most
	}
	if !late.Stop() && err != nil {
		return nil, false, apierrors.NewTimeoutError(fmt.Sprintf("the body of the request did not come within %s", wait), 1)
	}
	if err != nil {
		return nil, false, apierrors.NewBadRequest("read the body of the request: " + err.Error())
	}
	rest := r.Body
	if whole {
		r.Body = &readBody{Reader: bytes.NewReader(read), Closer: rest}
	} else {
		r.Body = &readBody{Reader: io.MultiReader(bytes.NewReader(read), rest), Closer: rest}
	}
	return read, whole, nil
}

// endBody has a read of the body that goes on fail. On HTTP/1 closing the body would wait
// for it, and the connection is this request's alone.
func endBody(r *http.Request) {
	if r.ProtoMajor < 2 {
		_ = connOf(r).SetReadDeadline(time.Unix(1, 0))
		return
	}
	r.Body.Close()
}

// readBody is a body of which the beginning, or all, was read.
type readBody struct {
	io.Reader
	io.Closer
}

// Read implements io.Reader. What was read to its end is not kept for as long as the
// request lasts.
func (b *readBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		b.Reader = strings.NewReader("")
	}
	return n, err
}

// What a body takes when it is decoded, as measured with objects made for that: containers,
// tolerations and finalizers without anything in them, with what validation says of each.
const (
	bytesPerByte   = 4
	bytesPerValue  = 512
	bytesPerObject = 2048
	// bytesPerCopy is what JSON patches that copy may make of the little that they say:
	// upstream bounds the sum of what they copy to 3 MiB.
	bytesPerCopy = 48 << 20
)

// validatedAtLength is whether a request is for a built-in kind. Custom resources are
// validated otherwise, their definitions have long schemas, and of EndpointSlices, which may
// say much of each of 1,000 endpoints, those that have more are not looked at further.
func validatedAtLength(info *request.RequestInfo) bool {
	return info.IsResourceRequest && info.APIGroup != apiextensions.GroupName && info.APIGroup != discovery.GroupName && legacyscheme.Scheme.IsGroupRegistered(info.APIGroup)
}

// estimate counts the values of an encoded object, and says how many bytes of memory it
// takes while it is decoded, converted and validated: that many at most, and not much less.
func estimate(body []byte, contentType string) (_, cost int64) {
	var values, objects, more int64
	switch {
	case strings.Contains(contentType, "protobuf"):
		objects = weigh.Protobuf(body)
	case strings.Contains(contentType, "yaml"):
		if trimmed := bytes.TrimLeft(body, " \t\r\n"); len(trimmed) > 0 && trimmed[0] == '{' && json.Valid(body) {
			values, objects = weigh.JSON(body)
		} else {
			objects = int64(bytes.Count(body, []byte("{")) + bytes.Count(body, []byte("\n")))
			values = int64(bytes.Count(body, []byte(",")) + bytes.Count(body, []byte("[")) + bytes.Count(body, []byte("- ")))
		}
	default:
		values, objects = weigh.JSON(body)
		if strings.Contains(contentType, "json-patch") && bytes.Contains(body, []byte("copy")) {
			more = bytesPerCopy
		}
	}
	return values + objects, bytesPerByte*int64(len(body)) + bytesPerValue*values + bytesPerObject*objects + more
}
