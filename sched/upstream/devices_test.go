package upstream

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	resourcev1 "k8s.io/api/resource/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/dynamic-resource-allocation/structured"
	fwk "k8s.io/kube-scheduler/framework"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/dynamicresources"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/feature"
	"pgregory.net/rapid"

	"timonel/sched"
)

// TestFeaturesOfDevicesAreUpstreams compares what is on by default.
func TestFeaturesOfDevicesAreUpstreams(t *testing.T) {
	want := dynamicresources.AllocatorFeatures(feature.NewSchedulerFeaturesFromGates(utilfeature.DefaultFeatureGate))
	if got := sched.DefaultConfig().Devices; got != want {
		t.Errorf("%+v; upstream %+v", got, want)
	}
}

// devices shows upstream's plugin the devices of a world. Extended resources are those of
// device plugins.
type devices struct {
	fwk.ResourceClaimTracker
	w *world
}

func (d devices) ResourceClaims() fwk.ResourceClaimTracker                 { return d }
func (d devices) ResourceSlices() fwk.ResourceSliceLister                  { return slicesOf{d.w} }
func (d devices) DeviceClasses() fwk.DeviceClassLister                     { return classesOf{d.w} }
func (d devices) DeviceClassResolver() fwk.DeviceClassResolver             { return d }
func (devices) GetDeviceClass(corev1.ResourceName) *resourcev1.DeviceClass { return nil }

func (d devices) List() ([]*resourcev1.ResourceClaim, error) { return d.w.resourceClaims, nil }

func (d devices) Get(namespace, name string) (*resourcev1.ResourceClaim, error) {
	if claim, ok := d.w.ResourceClaim(namespace, name); ok {
		return claim, nil
	}
	return nil, fmt.Errorf("could not find ResourceClaim %q", namespace+"/"+name)
}

func (devices) GetPendingAllocation(types.UID) *resourcev1.AllocationResult { return nil }

func (d devices) GatherAllocatedState() (*structured.AllocatedState, error) {
	out := &structured.AllocatedState{
		AllocatedDevices: sets.New[structured.DeviceID](), AllocatedSharedDeviceIDs: sets.New[structured.SharedDeviceID](),
		AggregatedCapacity: structured.NewConsumedCapacityCollection(),
	}
	for _, claim := range d.w.resourceClaims {
		if claim.Status.Allocation == nil {
			continue
		}
		for _, r := range claim.Status.Allocation.Devices.Results {
			id := structured.MakeDeviceID(r.Driver, r.Pool, r.Device)
			switch {
			case r.AdminAccess != nil && *r.AdminAccess:
			case r.ShareID != nil:
				out.AllocatedSharedDeviceIDs.Insert(structured.MakeSharedDeviceID(id, r.ShareID))
				out.AggregatedCapacity.Insert(structured.NewDeviceConsumedCapacity(id, r.ConsumedCapacity))
			default:
				out.AllocatedDevices.Insert(id)
			}
		}
	}
	return out, nil
}

type slicesOf struct{ w *world }

// ListWithDeviceTaintRules knows of rules that name a device alone.
func (s slicesOf) ListWithDeviceTaintRules() ([]*resourcev1.ResourceSlice, error) {
	var out []*resourcev1.ResourceSlice
	for _, slice := range s.w.resourceSlices {
		slice = slice.DeepCopy()
		for i := range slice.Spec.Devices {
			for _, rule := range s.w.taintRules {
				if *rule.Spec.DeviceSelector.Device == slice.Spec.Devices[i].Name {
					slice.Spec.Devices[i].Taints = append(slice.Spec.Devices[i].Taints, rule.Spec.Taint)
				}
			}
		}
		out = append(out, slice)
	}
	return out, nil
}

type classesOf struct{ w *world }

func (c classesOf) List() ([]*resourcev1.DeviceClass, error) { return c.w.deviceClasses, nil }

func (c classesOf) Get(name string) (*resourcev1.DeviceClass, error) {
	if class, ok := c.w.DeviceClass(name); ok {
		return class, nil
	}
	return nil, apierrors.NewNotFound(resourcev1.Resource("deviceclass"), name)
}

// drawDevices draws devices, claims of which some have some, and whether the pod has claims.
func (w *world) drawDevices(t *rapid.T, pod *corev1.Pod) {
	if !one(t, 2, "devices") {
		return
	}
	for _, name := range []string{"gpu", "nic"} {
		if !one(t, 12, "no class "+name) {
			w.deviceClasses = append(w.deviceClasses, &resourcev1.DeviceClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: resourcev1.DeviceClassSpec{
				Selectors: []resourcev1.DeviceSelector{{CEL: &resourcev1.CELDeviceSelector{Expression: fmt.Sprintf("device.driver == %q", name+".example.com")}}},
			}})
		}
	}
	for _, n := range w.nodes {
		for _, class := range []string{"gpu", "nic"} {
			if !one(t, 5, "no "+class) {
				w.resourceSlices = append(w.resourceSlices, drawSlice(t, class, n.Name))
			}
		}
	}
	if one(t, 4, "far") {
		far, yes := drawSlice(t, "nic", "far"), true
		far.Spec.NodeName, far.Spec.AllNodes = nil, &yes
		w.resourceSlices = append(w.resourceSlices, far)
	}
	if one(t, 3, "rule") {
		device := "d0"
		w.taintRules = append(w.taintRules, &resourcev1.DeviceTaintRule{Spec: resourcev1.DeviceTaintRuleSpec{
			DeviceSelector: &resourcev1.DeviceTaintSelector{Device: &device}, Taint: resourcev1.DeviceTaint{Key: "bad", Effect: resourcev1.DeviceTaintEffectNoSchedule}}})
	}
	for i := range rapid.IntRange(1, 5).Draw(t, "claims") {
		w.resourceClaims = append(w.resourceClaims, w.drawClaim(t, fmt.Sprintf("c%d", i)))
	}
	if one(t, 4, "none of them") {
		return
	}
	for i := range rapid.IntRange(1, 2).Draw(t, "of pod") {
		name := fmt.Sprintf("c%d", (i+rapid.IntRange(0, 5).Draw(t, "claim"))%6) // may not exist
		pod.Spec.ResourceClaims = append(pod.Spec.ResourceClaims, corev1.PodResourceClaim{Name: fmt.Sprint(i), ResourceClaimName: &name})
	}
}

func drawSlice(t *rapid.T, class, node string) *resourcev1.ResourceSlice {
	s := &resourcev1.ResourceSlice{ObjectMeta: metav1.ObjectMeta{Name: class + "-" + node}, Spec: resourcev1.ResourceSliceSpec{
		Driver: class + ".example.com", NodeName: &node, Pool: resourcev1.ResourcePool{Name: node, Generation: 1, ResourceSliceCount: 1},
	}}
	if one(t, 8, "half a pool") {
		s.Spec.Pool.ResourceSliceCount = 2
	}
	for i := range rapid.IntRange(1, 3).Draw(t, "number") {
		model := rapid.SampledFrom([]string{"small", "large"}).Draw(t, "model")
		d := resourcev1.Device{Name: fmt.Sprintf("d%d", i), Attributes: map[resourcev1.QualifiedName]resourcev1.DeviceAttribute{"model": {StringValue: &model}}}
		if one(t, 4, "shared") {
			yes := true
			d.AllowMultipleAllocations = &yes
			d.Capacity = map[resourcev1.QualifiedName]resourcev1.DeviceCapacity{"memory": {Value: resource.MustParse("8Gi")}}
		}
		if one(t, 8, "tainted") {
			d.Taints = []resourcev1.DeviceTaint{{Key: "bad", Effect: resourcev1.DeviceTaintEffectNoSchedule}}
		}
		if one(t, 8, "to be made ready") {
			d.BindingConditions, d.BindingFailureConditions = []string{"attached"}, []string{"broken"}
		}
		s.Spec.Devices = append(s.Spec.Devices, d)
	}
	return s
}

func (w *world) drawClaim(t *rapid.T, name string) *resourcev1.ResourceClaim {
	c := &resourcev1.ResourceClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(name), ResourceVersion: "1"}}
	if one(t, 15, "going") {
		c.DeletionTimestamp = &metav1.Time{}
	}
	class := rapid.SampledFrom([]string{"gpu", "nic"}).Draw(t, "class")
	exact := &resourcev1.ExactDeviceRequest{DeviceClassName: class, AllocationMode: resourcev1.DeviceAllocationModeExactCount, Count: int64(rapid.IntRange(1, 2).Draw(t, "count"))}
	large := []resourcev1.DeviceSelector{{CEL: &resourcev1.CELDeviceSelector{Expression: fmt.Sprintf("device.attributes[%q].model == 'large'", class+".example.com")}}}
	request := resourcev1.DeviceRequest{Name: "r", Exactly: exact}
	switch rapid.IntRange(0, 7).Draw(t, "request") {
	case 1:
		exact.Selectors = large
	case 2:
		exact.AllocationMode, exact.Count = resourcev1.DeviceAllocationModeAll, 0
	case 3:
		yes := true
		exact.AdminAccess = &yes
	case 4:
		request = resourcev1.DeviceRequest{Name: "r", FirstAvailable: []resourcev1.DeviceSubRequest{
			{Name: "best", DeviceClassName: class, AllocationMode: resourcev1.DeviceAllocationModeExactCount, Count: 1, Selectors: large},
			{Name: "any", DeviceClassName: class, AllocationMode: resourcev1.DeviceAllocationModeExactCount, Count: 1},
		}}
	case 5:
		exact.Tolerations = []resourcev1.DeviceToleration{{Key: "bad", Operator: resourcev1.DeviceTolerationOpExists}}
	case 6:
		exact.Capacity = &resourcev1.CapacityRequirements{Requests: map[resourcev1.QualifiedName]resource.Quantity{"memory": resource.MustParse("5Gi")}}
	case 7:
		same := resourcev1.FullyQualifiedName(class + ".example.com/model")
		exact.Count = 2
		c.Spec.Devices.Constraints = []resourcev1.DeviceConstraint{{MatchAttribute: &same}}
	}
	c.Spec.Devices.Requests = []resourcev1.DeviceRequest{request}
	if len(w.resourceSlices) == 0 || !one(t, 3, "allocated") {
		return c
	}
	slice := w.resourceSlices[rapid.IntRange(0, len(w.resourceSlices)-1).Draw(t, "from")]
	d := slice.Spec.Devices[0]
	result := resourcev1.DeviceRequestAllocationResult{Request: "r", Driver: slice.Spec.Driver, Pool: slice.Spec.Pool.Name, Device: d.Name}
	if request.Exactly == nil {
		result.Request = rapid.SampledFrom([]string{"r/best", "r/any"}).Draw(t, "got")
	}
	if d.AllowMultipleAllocations != nil {
		share := types.UID("share-" + name)
		result.ShareID, result.ConsumedCapacity = &share, map[resourcev1.QualifiedName]resource.Quantity{"memory": resource.MustParse("4Gi")}
	}
	if result.BindingConditions = d.BindingConditions; len(d.BindingConditions) > 0 {
		result.BindingFailureConditions = d.BindingFailureConditions
		if one(t, 2, "broken") {
			c.Status.Devices = []resourcev1.AllocatedDeviceStatus{{Driver: result.Driver, Pool: result.Pool, Device: result.Device, Conditions: []metav1.Condition{{Type: "broken", Status: metav1.ConditionTrue}}}}
		}
	}
	c.Status.Allocation = &resourcev1.AllocationResult{Devices: resourcev1.DeviceAllocationResult{Results: []resourcev1.DeviceRequestAllocationResult{result}}}
	if slice.Spec.NodeName != nil {
		c.Status.Allocation.NodeSelector = &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchFields: []corev1.NodeSelectorRequirement{{Key: metav1.ObjectNameField, Operator: corev1.NodeSelectorOpIn, Values: []string{*slice.Spec.NodeName}}}}}}
	}
	if one(t, 2, "reserved") {
		c.Status.ReservedFor = []resourcev1.ResourceClaimConsumerReference{{Resource: "pods", Name: "other", UID: "other"}}
	}
	return c
}
