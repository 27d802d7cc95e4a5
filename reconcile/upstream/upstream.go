package upstream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	certificatesv1 "k8s.io/api/certificates/v1"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/cache"
	controllersmetrics "k8s.io/component-base/metrics/prometheus/controllers"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	"k8s.io/kubernetes/cmd/kube-controller-manager/names"
	config "k8s.io/kubernetes/pkg/controller/apis/config"

	"timonel/reconcile/upstream/feed"
	"timonel/state/objects"
)

// Config says what upstream's controllers work with.
type Config struct {
	// Cache is the state that they read.
	Cache *objects.Cache
	// Client is the API in memory, as a user with groups.
	Client func(user string, groups ...string) *rest.Config
	// CAFile and CAKeyFile are the cluster's authority, PEM: what
	// CertificateSigningRequests are signed with.
	CAFile, CAKeyFile string
	// Dir is a folder that the controllers may make folders in.
	Dir string
	// Log is where it is said what starts and what fails. Default slog.Default().
	Log *slog.Logger
}

// A controller that fails is built anew after leastPause, after twice that the next
// time, and so on up to mostPause.
const (
	leastPause = time.Second
	mostPause  = time.Minute
)

// endPatience is how long a controller may take to end with its term. A replica cannot
// lead again before all have ended or are given up.
const endPatience = 5 * time.Second

// mapperPeriod is how old what is known of the API's resources may be for the
// controllers that map kinds, as in upstream.
const mapperPeriod = 30 * time.Second

// Controllers are upstream's controllers.
type Controllers struct {
	Config
	component   config.KubeControllerManagerConfiguration
	descriptors map[string]*app.ControllerDescriptor
	metrics     *controllersmetrics.ControllerManagerMetrics
}

// New returns upstream's controllers. Nothing is made before they run.
func New(c Config) (*Controllers, error) {
	for field, missing := range map[string]bool{
		"Cache": c.Cache == nil, "Client": c.Client == nil, "CAFile": c.CAFile == "", "CAKeyFile": c.CAKeyFile == "", "Dir": c.Dir == "",
	} {
		if missing {
			return nil, fmt.Errorf("upstream: Config.%s is missing", field)
		}
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	component, err := options.NewDefaultComponentConfig()
	if err != nil {
		return nil, fmt.Errorf("upstream: the controllers' defaults: %w", err)
	}
	component.CSRSigningController.ClusterSigningCertFile = c.CAFile
	component.CSRSigningController.ClusterSigningKeyFile = c.CAKeyFile
	component.SAController.RootCAFile = c.CAFile
	// Programs that upstream would run to attach flex volumes: there are none.
	component.PersistentVolumeBinderController.VolumeConfiguration.FlexVolumePluginDir = filepath.Join(c.Dir, "flexvolumes")
	controllersmetrics.Register()
	return &Controllers{
		Config: c, component: component, descriptors: app.NewControllerDescriptors(),
		metrics: controllersmetrics.NewControllerManagerMetrics("kube-controller-manager"),
	}, nil
}

// Run runs the controllers until ctx ends, whose error it returns. Their requests
// carry ctx's values.
func (c *Controllers) Run(ctx context.Context) error {
	builder := clients{ctx, c.Client}
	discovery, err := builder.DiscoveryClient("controller-discovery")
	if err != nil {
		return fmt.Errorf("upstream: %w", err)
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(discovery))
	group, ctx := errgroup.WithContext(ctx)
	if err := healthy(ctx, discovery.RESTClient()); err != nil {
		return err
	}
	source := feed.New(c.Cache)
	group.Go(func() error { return source.Run(ctx) })
	group.Go(func() error { return resetEvery(ctx, mapperPeriod, mapper.Reset) })
	for _, s := range run() {
		group.Go(func() error {
			if err := exists(ctx, source, s); err != nil {
				return err
			}
			return c.keep(ctx, s.name, func(ctx context.Context) error { return c.control(ctx, s.name, source, mapper, builder) })
		})
	}
	group.Go(func() error {
		return c.keep(ctx, "certificatesigningrequest-guard", func(ctx context.Context) error { return c.guardSigning(ctx, source, builder) })
	})
	return group.Wait()
}

// healthPeriod is how often the API is asked whether it is healthy, until it is.
const healthPeriod = 100 * time.Millisecond

// healthy returns when the API is: on the first start of a cluster the roles that the
// controllers act by are made a moment after it serves.
func healthy(ctx context.Context, api rest.Interface) error {
	for {
		err := api.Get().AbsPath("/healthz").Do(ctx).Error()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(healthPeriod):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// resetEvery calls reset again and again, which only forgets: what is not asked for
// is not read again.
func resetEvery(ctx context.Context, period time.Duration, reset func()) error {
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			reset()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// exists returns when there is an object that a controller works on.
func exists(ctx context.Context, source *feed.Feed, s started) error {
	if len(s.on) == 0 {
		return nil
	}
	ctx, end := context.WithCancel(ctx)
	factory := source.NewFactory(ctx)
	defer factory.Shutdown()
	defer end()
	found := make(chan struct{}, 1)
	for _, resource := range s.on {
		informer, err := factory.ForResource(resource)
		if err != nil {
			return err
		}
		if _, err := informer.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: func(any) {
			select {
			case found <- struct{}{}:
			default:
			}
		}}); err != nil {
			return err
		}
	}
	factory.Start(nil)
	select {
	case <-found:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// errNotBuilt is that of a controller which upstream does not build: its feature is off.
var errNotBuilt = errors.New("off")

// keep runs a controller until ctx ends, again when it fails.
func (c *Controllers) keep(ctx context.Context, name string, control func(context.Context) error) error {
	for pause := leastPause; ; pause = min(2*pause, mostPause) {
		done := make(chan error, 1)
		go func() { done <- recovered(ctx, control) }()
		var err error
		select {
		case err = <-done:
		case <-ctx.Done():
			select {
			case <-done:
			case <-time.After(endPatience):
				c.Log.Warn("one of Kubernetes' controllers did not end with the term and is left alone, what it writes is refused", "name", name)
			}
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, errNotBuilt):
			return nil
		}
		c.Log.Error("one of Kubernetes' controllers failed and is started again", "name", name, "in", pause, "error", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// recovered calls f and makes an error of a panic.
func recovered(ctx context.Context, f func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return f(ctx)
}

// control builds a controller and runs it until ctx ends or it does.
func (c *Controllers) control(ctx context.Context, name string, source *feed.Feed, mapper *restmapper.DeferredDiscoveryRESTMapper, builder clients) error {
	ctx, end := context.WithCancel(ctx)
	factory := source.NewFactory(ctx)
	defer factory.Shutdown()
	defer end()
	if err := os.MkdirAll(c.component.PersistentVolumeBinderController.VolumeConfiguration.FlexVolumePluginDir, 0o700); err != nil {
		return err
	}
	informersStarted := make(chan struct{})
	if name == names.CertificateSigningRequestSigningController {
		factory.Hide(certificatesv1.SchemeGroupVersion.WithResource("certificatesigningrequests"), wantsTimonel)
	}
	environment := app.ControllerContext{
		ClientBuilder:                   builder,
		InformerFactory:                 factory,
		ObjectOrMetadataInformerFactory: factory,
		ComponentConfig:                 c.component,
		RESTMapper:                      mapper,
		InformersStarted:                informersStarted,
		ResyncPeriod:                    func() time.Duration { return 0 },
		ControllerManagerMetrics:        c.metrics,
	}
	beside := func(context.Context) {}
	if name == names.StorageVersionMigratorController {
		var err error
		if beside, err = addGraph(ctx, &environment); err != nil {
			return err
		}
	}
	controller, err := c.descriptors[name].BuildController(ctx, environment)
	if err != nil {
		return err
	}
	if controller == nil {
		return errNotBuilt
	}
	if foreign := factory.Foreign(); len(foreign) > 0 {
		return fmt.Errorf("it reads %v, which objects.Cache does not decode: add them to its kinds", foreign)
	}
	factory.Start(nil)
	close(informersStarted)
	c.Log.Info("one of Kubernetes' controllers starts", "name", name)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end()
	wg.Go(func() { beside(ctx) })
	controller.Run(ctx)
	return errors.New("it returned")
}
