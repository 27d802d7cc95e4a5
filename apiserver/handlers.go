package apiserver

import (
	"net/http"

	genericapifilters "k8s.io/apiserver/pkg/endpoints/filters"
	"k8s.io/apiserver/pkg/endpoints/filters/impersonation"
	genericfeatures "k8s.io/apiserver/pkg/features"
	genericapiserver "k8s.io/apiserver/pkg/server"
	genericfilters "k8s.io/apiserver/pkg/server/filters"
	"k8s.io/apiserver/pkg/server/routine"
	flowcontrolrequest "k8s.io/apiserver/pkg/util/flowcontrol/request"

	"timonel/trust"
)

// lifecycle tells the handlers of requests how far the server is.
type lifecycle struct {
	discovered chan struct{} // closed when all paths are installed
	stopping   chan struct{} // closed when the server stops
	inTouch    func() (lost <-chan struct{}, err error)
	guard      *trust.Guard // nil: nobody is ever revoked
	slow       *slowWatches
	strangers  *strangers
	bodies     *bodies
	tunnels    *nodeStreams
	answers    *answers
}

func newLifecycle(inTouch func() (<-chan struct{}, error), guard *trust.Guard, slow *slowWatches, bodies *bodies, tunnels *nodeStreams, answers *answers) lifecycle {
	return lifecycle{inTouch: inTouch, guard: guard, slow: slow, bodies: bodies, tunnels: tunnels, answers: answers, strangers: newStrangers(), discovered: make(chan struct{}), stopping: make(chan struct{})}
}

// ShuttingDown implements apirequest.ServerShutdownSignal.
func (l lifecycle) ShuttingDown() <-chan struct{} { return l.stopping }

// follow closes discovered when all of the signals are, unless stop comes before.
func (l lifecycle) follow(signals map[string]<-chan struct{}, stop <-chan struct{}) {
	for _, s := range signals {
		select {
		case <-s:
		case <-stop:
			return
		}
	}
	close(l.discovered)
}

// handlers is what a request passes on its way to api: upstream's filters in
// upstream's order (k8s.io/apiserver/pkg/server, DefaultBuildHandlerChain), but for
// those that only measure the filters between them and those that trace, as no
// tracing is set up: together they cost a twentieth of a small request.
func (l lifecycle) handlers(api http.Handler, c *genericapiserver.Config) http.Handler {
	touch := touchFilter{inTouch: l.inTouch, serializer: c.Serializer}
	guard := guardFilter{guard: l.guard, serializer: c.Serializer}
	l.tunnels.serializer = c.Serializer
	h := genericapifilters.WithAuthorization(l.tunnels.after(api), c.Authorization.Authorizer, c.Serializer)
	if c.FlowControl != nil {
		estimator := flowcontrolrequest.NewWorkEstimator(c.StorageObjectCountTracker.Get, c.FlowControl.GetInterestedWatchCount,
			flowcontrolrequest.DefaultWorkEstimatorConfig(), c.FlowControl.GetMaxSeats)
		h = genericfilters.WithPriorityAndFairness(h, c.LongRunningFunc, c.FlowControl, estimator, c.RequestTimeout/4)
	} else {
		h = genericfilters.WithMaxInFlightLimit(h, c.MaxRequestsInFlight, c.MaxMutatingRequestsInFlight, c.LongRunningFunc)
	}
	if c.FeatureGate.Enabled(genericfeatures.ConstrainedImpersonation) {
		h = impersonation.WithConstrainedImpersonation(h, c.Authorization.Authorizer, c.Serializer)
	} else {
		h = impersonation.WithImpersonation(h, c.Authorization.Authorizer, c.Serializer)
	}
	h = genericapifilters.WithAudit(h, c.AuditBackend, c.AuditPolicyRuleEvaluator, c.LongRunningFunc)

	l.bodies.most, l.bodies.serializer, l.bodies.longRunning = c.MaxRequestBodyBytes, c.Serializer, c.LongRunningFunc
	l.slow.serializer = c.Serializer
	l.answers.longRunning = c.LongRunningFunc
	h = l.answers.after(h)
	h = l.slow.after(h)
	h = l.bodies.after(h)
	h = touch.after(h)
	h = guard.after(h)
	h = l.strangers.after(h)
	unauthorized := genericapifilters.WithFailedAuthenticationAudit(genericapifilters.Unauthorized(c.Serializer), c.AuditBackend, c.AuditPolicyRuleEvaluator)
	h = genericapifilters.WithAuthentication(h, c.Authentication.Authenticator, unauthorized, c.Authentication.APIAudiences, c.Authentication.RequestHeaderConfig)
	h = genericfilters.WithCORS(h, c.CorsAllowedOriginList, nil, nil, nil, "true")
	h = genericapifilters.WithWarningRecorder(h) // within the timeout, which makes its headers safe
	h = l.strangers.within(h)
	h = genericfilters.WithTimeoutForNonLongRunningRequests(h, c.LongRunningFunc)
	h = genericapifilters.WithRequestDeadline(h, c.AuditBackend, c.AuditPolicyRuleEvaluator, c.LongRunningFunc, c.Serializer, c.RequestTimeout)
	h = genericfilters.WithWaitGroup(h, c.LongRunningFunc, c.NonLongRunningRequestWaitGroup)
	if c.ShutdownWatchTerminationGracePeriod > 0 {
		h = genericfilters.WithWatchTerminationDuringShutdown(h, l, c.WatchRequestWaitGroup)
	}
	if c.SecureServing != nil && !c.SecureServing.DisableHTTP2 && c.GoawayChance > 0 {
		h = genericfilters.WithProbabilisticGoaway(h, c.GoawayChance)
	}
	h = genericapifilters.WithCacheControl(h)
	h = genericfilters.WithHSTS(h, c.HSTSDirectives)
	if c.ShutdownSendRetryAfter {
		h = genericfilters.WithRetryAfter(h, l.stopping)
	}
	h = genericfilters.WithHTTPLogging(h)
	h = genericapifilters.WithLatencyTrackers(h)
	if c.FeatureGate.Enabled(genericfeatures.APIServingWithRoutine) {
		h = routine.WithRoutine(h, c.LongRunningFunc)
	}
	h = l.answers.before(h)
	h = l.slow.before(h)
	h = guard.before(h)
	h = touch.before(h)
	h = genericapifilters.WithRequestInfo(h, c.RequestInfoResolver)
	h = genericapifilters.WithRequestReceivedTimestamp(h)
	h = genericapifilters.WithMuxAndDiscoveryComplete(h, l.discovered)
	h = genericfilters.WithPanicRecovery(h, c.RequestInfoResolver)
	h = genericapifilters.WithAuditInit(h)
	return l.strangers.before(h)
}
