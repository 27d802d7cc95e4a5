package weigh_test

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	utiljson "k8s.io/apimachinery/pkg/util/json"

	"timonel/internal/weigh"
)

// heapOf is what n of something take.
func heapOf(n int, one func() any) int64 {
	var before, after runtime.MemStats
	kept := make([]any, n)
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range kept {
		kept[i] = one()
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(kept)
	return int64(after.HeapAlloc-before.HeapAlloc) / int64(n)
}

func many[T any](n int, one func(i int) T) (all []T) {
	for i := range n {
		all = append(all, one(i))
	}
	return all
}

// TestDecoded compares what is said of objects with what they take: never less, and not
// more than a few times that.
func TestDecoded(t *testing.T) {
	pod := func(spec corev1.PodSpec) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "n"}, Spec: spec}
	}
	typed := map[string]kruntime.Object{
		"a pod": pod(corev1.PodSpec{NodeName: "n", Containers: []corev1.Container{{Name: "a", Image: "example.com/a:1", TerminationMessagePath: "/dev/termination-log", ImagePullPolicy: "Always", TerminationMessagePolicy: "File"}}}),
		"a pod of short containers": pod(corev1.PodSpec{Containers: many(2000, func(i int) corev1.Container {
			return corev1.Container{Name: fmt.Sprint(i), Image: "a", TerminationMessagePath: "a", TerminationMessagePolicy: "File", ImagePullPolicy: "Always"}
		})}),
		"a pod of ports": pod(corev1.PodSpec{Containers: []corev1.Container{{Ports: many(16000, func(i int) corev1.ContainerPort {
			return corev1.ContainerPort{ContainerPort: int32(i)}
		})}}}),
		"a pod of variables": pod(corev1.PodSpec{Containers: []corev1.Container{{Env: many(16000, func(i int) corev1.EnvVar {
			return corev1.EnvVar{Name: "a", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "a"}}}
		})}}}),
		"a pod of probes": pod(corev1.PodSpec{Containers: many(2000, func(i int) corev1.Container {
			return corev1.Container{Name: "a", LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt(1)}}}}
		})}),
		"a pod of volumes": pod(corev1.PodSpec{Volumes: many(4000, func(i int) corev1.Volume {
			return corev1.Volume{Name: "a", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}
		})}),
		"a pod of tolerations":     pod(corev1.PodSpec{Tolerations: many(16000, func(i int) corev1.Toleration { return corev1.Toleration{Operator: "Exists"} })}),
		"a ConfigMap of one value": &corev1.ConfigMap{Data: map[string]string{"a": strings.Repeat("x", 1<<20)}},
		"a ConfigMap of many": &corev1.ConfigMap{Data: func() map[string]string {
			m := map[string]string{}
			for i := range 30000 {
				m[fmt.Sprintf("%x", i)] = ""
			}
			return m
		}()},
		"owned by many": &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{OwnerReferences: many(5000, func(i int) metav1.OwnerReference {
			return metav1.OwnerReference{APIVersion: "v1", Kind: "P", Name: "a", UID: "u"}
		})}},
	}
	type marshaler interface {
		Marshal() ([]byte, error)
		Unmarshal([]byte) error
	}
	check := func(t *testing.T, value []byte, took int64, most int64) {
		said := weigh.Decoded(value)
		t.Logf("%d bytes take %d, said %d: %.1f times", len(value), took, said, float64(said)/float64(took))
		if said < took {
			t.Errorf("%d bytes are said to take %d, and take %d", len(value), said, took)
		}
		if said > most*took {
			t.Errorf("%d bytes are said to take %d, and take %d alone", len(value), said, took)
		}
	}
	for name, obj := range typed {
		t.Run(name, func(t *testing.T) {
			raw, err := obj.(marshaler).Marshal()
			if err != nil {
				t.Fatal(err)
			}
			value, err := (&kruntime.Unknown{TypeMeta: kruntime.TypeMeta{APIVersion: "v1", Kind: "Pod"}, Raw: raw}).Marshal()
			if err != nil {
				t.Fatal(err)
			}
			value = append([]byte("k8s\x00"), value...)
			check(t, value, heapOf(20, func() any {
				m := obj.DeepCopyObject().(marshaler)
				switch o := m.(type) {
				case *corev1.Pod:
					*o = corev1.Pod{}
				case *corev1.ConfigMap:
					*o = corev1.ConfigMap{}
				}
				if err := m.Unmarshal(raw); err != nil {
					t.Fatal(err)
				}
				return m
			}), 8)
		})
	}
	for name, body := range map[string]string{
		"objects of one":  `{"x":[` + strings.Repeat(`{"":0},`, 20000) + `{}]}`,
		"empty objects":   `{"x":[` + strings.Repeat(`{},`, 20000) + `{}]}`,
		"empty lists":     `{"x":[` + strings.Repeat(`[],`, 20000) + `[]]}`,
		"lists of one":    `{"x":[` + strings.Repeat(`[0],`, 20000) + `[]]}`,
		"numbers":         `{"x":[` + strings.Repeat(`1234,`, 20000) + `1]}`,
		"floats":          `{"x":[` + strings.Repeat(`.1,`, 0) + strings.Repeat(`1.5,`, 20000) + `1]}`,
		"strings":         `{"x":[` + strings.Repeat(`"a",`, 20000) + `"a"]}`,
		"a text":          `{"x":"` + strings.Repeat(`a{[,`, 200000) + `"}`,
		"deep lists":      `{"x":` + strings.Repeat(`[`, 9000) + strings.Repeat(`]`, 9000) + `}`,
		"deep objects":    strings.Repeat(`{"":`, 9000) + `0` + strings.Repeat(`}`, 9000),
		"objects of nine": `{"x":[` + strings.Repeat(`{"1":0,"2":0,"3":0,"4":0,"5":0,"6":0,"7":0,"8":0,"9":0},`, 5000) + `{}]}`,
		"one of many": func() string {
			var b strings.Builder
			for i := range 29000 {
				fmt.Fprintf(&b, `"%x":0,`, i)
			}
			return `{` + b.String() + `"x":0}`
		}(),
	} {
		t.Run(name, func(t *testing.T) {
			if !json.Valid([]byte(body)) {
				t.Fatal("not JSON")
			}
			check(t, []byte(body), heapOf(10, func() any {
				m := map[string]any{}
				if err := utiljson.Unmarshal([]byte(body), &m); err != nil {
					t.Fatal(err)
				}
				return m
			}), 8)
		})
	}
}

func TestIndented(t *testing.T) {
	for name, body := range map[string]string{
		"flat":   `{"x":[` + strings.Repeat(`1,`, 1000) + `1]}`,
		"deep":   `{"x":` + strings.Repeat(`[`, 3000) + `0` + strings.Repeat(`]`, 3000) + `}`,
		"deeper": strings.Repeat(`{"":`, 3000) + `0` + strings.Repeat(`}`, 3000),
	} {
		t.Run(name, func(t *testing.T) {
			var v any
			if err := json.Unmarshal([]byte(body), &v); err != nil {
				t.Fatal(err)
			}
			out, err := json.MarshalIndent(v, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			// A colon gets a space.
			if said := 2*int64(len(body)) + weigh.Indented([]byte(body)); said < int64(len(out)) || said > 2*int64(len(out))+int64(2*len(body)) {
				t.Errorf("%d bytes become %d, said %d", len(body), len(out), said)
			}
		})
	}
}
