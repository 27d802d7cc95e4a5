package upstream

import (
	"context"
	"fmt"
	"sync"
	"time"

	"k8s.io/client-go/metadata"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/pkg/controller/garbagecollector"
)

// graphPeriod is how often the graph asks for the API's resources, as in upstream.
const graphPeriod = 30 * time.Second

// addGraph gives a controller the graph that upstream's garbage collector builds of
// all objects, and returns what keeps it up to date: that collector with no worker,
// so that it collects nothing.
func addGraph(ctx context.Context, controllers *app.ControllerContext) (func(context.Context), error) {
	const account = "generic-garbage-collector"
	client, err := controllers.NewClient(account)
	if err != nil {
		return nil, err
	}
	config, err := controllers.NewClientConfig(account)
	if err != nil {
		return nil, err
	}
	objects, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("make the client of the garbage collector's graph: %w", err)
	}
	controllers.GraphBuilder = garbagecollector.NewDependencyGraphBuilder(ctx, objects, controllers.RESTMapper,
		garbagecollector.DefaultIgnoredResources(), controllers.ObjectOrMetadataInformerFactory, controllers.InformersStarted)
	collector, err := garbagecollector.NewComposedGarbageCollector(ctx, client, objects, controllers.RESTMapper, controllers.GraphBuilder)
	if err != nil {
		return nil, fmt.Errorf("make the garbage collector's graph: %w", err)
	}
	return func(ctx context.Context) {
		var wg sync.WaitGroup
		wg.Go(func() { collector.Run(ctx, 0, graphPeriod) })
		wg.Go(func() { collector.Sync(ctx, client.Discovery(), graphPeriod) })
		wg.Wait()
	}, nil
}
