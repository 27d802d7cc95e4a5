package eviction

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// Signal is something of which a node may run out, as upstream names it.
type Signal string

// The signals. nodefs is the file system of the agent's data folder; imagefs is
// that of images and containers' layers, which may be the same.
const (
	MemoryAvailable   Signal = "memory.available"
	NodeFsAvailable   Signal = "nodefs.available"
	NodeFsInodesFree  Signal = "nodefs.inodesFree"
	ImageFsAvailable  Signal = "imagefs.available"
	ImageFsInodesFree Signal = "imagefs.inodesFree"
	PIDAvailable      Signal = "pid.available"
)

// signals are all of them, in the order in which they are looked after: what is
// first kills the machine first.
var signals = []Signal{MemoryAvailable, NodeFsAvailable, NodeFsInodesFree, ImageFsAvailable, ImageFsInodesFree, PIDAvailable}

// Resources that are named in messages, beside those of Kubernetes.
const (
	resourceInodes corev1.ResourceName = "inodes"
	resourcePids   corev1.ResourceName = "pids"
)

// resource is what pods take of it.
func (s Signal) resource() corev1.ResourceName {
	switch s {
	case MemoryAvailable:
		return corev1.ResourceMemory
	case PIDAvailable:
		return resourcePids
	case NodeFsInodesFree, ImageFsInodesFree:
		return resourceInodes
	}
	return corev1.ResourceEphemeralStorage
}

// condition is what the Node says when it is short.
func (s Signal) condition() corev1.NodeConditionType {
	switch s {
	case MemoryAvailable:
		return corev1.NodeMemoryPressure
	case PIDAvailable:
		return corev1.NodePIDPressure
	}
	return corev1.NodeDiskPressure
}

func (s Signal) disk() bool { return s.condition() == corev1.NodeDiskPressure }

// Value is a quantity, or a share of what there is.
type Value struct {
	Quantity *resource.Quantity
	Share    float64
}

// of is the value where there is so much.
func (v Value) of(capacity int64) *resource.Quantity {
	if v.Quantity != nil {
		q := v.Quantity.DeepCopy()
		return &q
	}
	return resource.NewQuantity(int64(float64(capacity)*v.Share), resource.BinarySI)
}

// Threshold says of how little being left is too little.
type Threshold struct {
	Signal Signal
	Value  Value
	// MinReclaim is how much more than that has to be left for it to be over.
	MinReclaim *Value
}

// DefaultHard are upstream's thresholds, and one of process ids: a node without
// any cannot be helped from outside.
const DefaultHard = "memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%,imagefs.available<15%,imagefs.inodesFree<5%,pid.available<10%"

// DefaultShared are those of a node whose disk is not its own.
const DefaultShared = "memory.available<100Mi,pid.available<10%"

// ParseHard reads thresholds as the kubelet's flag has them:
// memory.available<100Mi,nodefs.available<10%. Empty or "none" is none; one of 0%
// or 100% is left out, as upstream's.
func ParseHard(text string) ([]Threshold, error) {
	values, err := parse(text, "<")
	if err != nil {
		return nil, err
	}
	var out []Threshold
	for _, s := range signals {
		v, ok := values[s]
		switch {
		case !ok || v.Quantity == nil && (v.Share == 0 || v.Share == 1):
			continue
		case v.Quantity != nil && v.Quantity.Sign() <= 0:
			return nil, fmt.Errorf("%s<%s: must be more than 0 (none: leave it out)", s, v.Quantity)
		}
		out = append(out, Threshold{Signal: s, Value: v})
	}
	return out, nil
}

// ParseMinReclaim adds to thresholds how much more has to be left, as the
// kubelet's flag has it: nodefs.available=500Mi,imagefs.available=2%.
func ParseMinReclaim(text string, thresholds []Threshold) error {
	values, err := parse(text, "=")
	if err != nil {
		return err
	}
	for i := range thresholds {
		if v, ok := values[thresholds[i].Signal]; ok {
			thresholds[i].MinReclaim = &v
		}
	}
	return nil
}

func parse(text, operator string) (map[Signal]Value, error) {
	out := map[Signal]Value{}
	if text = strings.TrimSpace(text); text == "" || text == "none" {
		return out, nil
	}
	for item := range strings.SplitSeq(text, ",") {
		name, value, ok := strings.Cut(strings.TrimSpace(item), operator)
		signal := Signal(strings.TrimSpace(name))
		if !ok {
			return nil, fmt.Errorf("%q is not SIGNAL%sVALUE, such as %s%s10%%", item, operator, NodeFsAvailable, operator)
		}
		if !slices.Contains(signals, signal) {
			return nil, fmt.Errorf("there is no signal %q: want %s", signal, list())
		}
		if _, twice := out[signal]; twice {
			return nil, fmt.Errorf("%s is there twice", signal)
		}
		v, err := parseValue(strings.TrimSpace(value))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", signal, err)
		}
		out[signal] = v
	}
	return out, nil
}

func parseValue(text string) (Value, error) {
	if percent, ok := strings.CutSuffix(text, "%"); ok {
		n, err := strconv.ParseFloat(percent, 64)
		if err != nil || !(n >= 0 && n <= 100) {
			return Value{}, fmt.Errorf("%q is not a percent from 0%% to 100%%", text)
		}
		return Value{Share: n / 100}, nil
	}
	q, err := resource.ParseQuantity(text)
	if err != nil || q.Sign() < 0 {
		return Value{}, fmt.Errorf("%q is neither a quantity, such as 100Mi, nor a percent", text)
	}
	return Value{Quantity: &q}, nil
}

func list() string {
	names := make([]string, len(signals))
	for i, s := range signals {
		names[i] = string(s)
	}
	return strings.Join(names, ", ")
}

// Reserved is what pods cannot have of a node, for a threshold would be met
// first: upstream's allocatable is without it, too.
func Reserved(thresholds []Threshold, capacity corev1.ResourceList) corev1.ResourceList {
	out := corev1.ResourceList{}
	for _, t := range thresholds {
		if t.Signal == MemoryAvailable || t.Signal == NodeFsAvailable {
			name := t.Signal.resource()
			q := capacity[name]
			out[name] = *t.Value.of(q.Value())
		}
	}
	return out
}
