package feed

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"
)

func service(namespace, name, ip string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: corev1.ServiceSpec{ClusterIP: ip}}
}

func slice(namespace, name, of string, ips ...string) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: of}},
		Endpoints:  []discoveryv1.Endpoint{{Addresses: ips}},
	}
}

func sliceNames(v *View, of Name) (out []string) {
	for _, s := range v.Slices(of) {
		out = append(out, s.Name)
	}
	return out
}

func TestAViewNeverChanges(t *testing.T) {
	t.Parallel()
	s := NewStore("a1")
	require.Equal(t, "a1", s.View().NodeName())
	require.False(t, s.View().Synced())
	web := Name{"default", "web"}
	s.Update(func(t *Txn) {
		t.SetService(service("default", "web", "10.96.0.1"))
		t.SetSlice(slice("default", "web-b", "web", "10.1.0.1"))
		t.SetSlice(slice("default", "web-a", "web", "10.1.0.2"))
		t.SetSlice(slice("default", "web-2-a", "web-2"))
		t.SetSynced()
	})
	first := s.View()
	require.True(t, first.Synced())
	s.Update(func(t *Txn) {
		t.SetService(service("default", "web", "10.96.0.2"))
		t.RemoveSlice(Name{"default", "web-a"})
		t.SetSlice(slice("default", "web-b", "other"))
	})
	require.Equal(t, "10.96.0.1", first.Service(web).Spec.ClusterIP)
	require.Equal(t, []string{"web-a", "web-b"}, sliceNames(first, web))
	require.Equal(t, []string{"web-2-a"}, sliceNames(first, Name{"default", "web-2"}))
	require.Equal(t, "10.96.0.2", s.View().Service(web).Spec.ClusterIP)
	require.Empty(t, sliceNames(s.View(), web))
	require.Equal(t, []string{"web-b"}, sliceNames(s.View(), Name{"default", "other"}))
	require.Greater(t, s.View().Revision(), first.Revision())

	before := s.View()
	s.Update(func(t *Txn) {
		t.RemoveService(Name{"default", "none"})
		t.RemoveSlice(Name{"default", "none"})
		t.SetSynced()
	})
	require.Same(t, before, s.View(), "nothing changed")
}

func TestServicesAreInTheOrderOfTheirNames(t *testing.T) {
	t.Parallel()
	s := NewStore("a1")
	want := []Name{{"a", "x"}, {"a-b", "a"}, {"a-b", "b"}, {"b", "a"}}
	s.Update(func(t *Txn) {
		for _, n := range []int{2, 0, 3, 1} {
			t.SetService(service(want[n].Namespace, want[n].Name, ""))
		}
	})
	var got []Name
	for n, o := range s.View().Services() {
		require.Equal(t, n.Name, o.Name)
		got = append(got, n)
	}
	require.Equal(t, want, got)
}

func TestChangesWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := NewStore("a1")
		got := make(chan Changes, 1)
		go func() {
			c, err := s.Changes(t.Context(), 0)
			if err == nil {
				got <- c
			}
		}()
		synctest.Wait()
		require.Empty(t, got)
		s.Update(func(t *Txn) { t.SetService(service("default", "web", "")) })
		c := <-got
		require.False(t, c.Reset)
		require.Equal(t, map[Name]struct{}{{"default", "web"}: {}}, c.Services)

		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := s.Changes(ctx, c.View.Revision())
		require.ErrorIs(t, err, context.Canceled)
	})
}

func TestWhoIsFarBehindLooksAtAll(t *testing.T) {
	t.Parallel()
	s := NewStore("a1")
	for i := range maxLog + 10 {
		s.Update(func(t *Txn) { t.SetService(service("default", fmt.Sprint(i), "")) })
	}
	c, err := s.Changes(t.Context(), 0)
	require.NoError(t, err)
	require.True(t, c.Reset)
	last := c.View.Revision()
	c, err = s.Changes(t.Context(), last-3)
	require.NoError(t, err)
	require.False(t, c.Reset)
	require.Len(t, c.Services, 3)
	require.LessOrEqual(t, len(s.log), maxLog)

	s.Update(func(t *Txn) { t.SetZone("z1") })
	c, err = s.Changes(t.Context(), last)
	require.NoError(t, err)
	require.True(t, c.Reset, "hints of every Service are read by the zone")
	require.Equal(t, "z1", c.View.Zone())
}

// Whoever follows changes, by whatever steps, knows what a map would hold.
func TestFollowingChangesIsTheSameAsLooking(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := NewStore("a1")
		services, slicesOf := map[Name]string{}, map[Name]*discoveryv1.EndpointSlice{}
		followed, after := map[Name]string{}, uint64(0)
		look := func(v *View, n Name) string {
			text := ""
			if o := v.Service(n); o != nil {
				text = "ip " + o.Spec.ClusterIP
			}
			for _, sl := range v.Slices(n) {
				text += " " + sl.Name + "=" + sl.Endpoints[0].Addresses[0]
			}
			return text
		}
		name := rapid.Custom(func(t *rapid.T) Name {
			return Name{rapid.SampledFrom([]string{"a", "a-b"}).Draw(t, "namespace"), rapid.SampledFrom([]string{"x", "x-1", "y"}).Draw(t, "name")}
		})
		t.Repeat(map[string]func(*rapid.T){
			"update": func(t *rapid.T) {
				s.Update(func(txn *Txn) {
					for range rapid.IntRange(1, 5).Draw(t, "n") {
						n, text := name.Draw(t, "of"), rapid.StringMatching("[a-z]").Draw(t, "text")
						switch rapid.IntRange(0, 3).Draw(t, "what") {
						case 0:
							txn.SetService(service(n.Namespace, n.Name, text))
							services[n] = text
						case 1:
							txn.RemoveService(n)
							delete(services, n)
						case 2:
							sl := slice(n.Namespace, n.Name, name.Draw(t, "service").Name, text)
							txn.SetSlice(sl)
							slicesOf[n] = sl
						case 3:
							txn.RemoveSlice(n)
							delete(slicesOf, n)
						}
					}
				})
			},
			"follow": func(t *rapid.T) {
				if s.View().Revision() == after {
					return
				}
				c, err := s.Changes(context.Background(), after)
				if err != nil || c.Reset {
					t.Fatalf("changes: %v, reset %v", err, c.Reset)
				}
				after = c.View.Revision()
				for n := range c.Services {
					if text := look(c.View, n); text == "" {
						delete(followed, n)
					} else {
						followed[n] = text
					}
				}
				want := map[Name]string{}
				for n, ip := range services {
					want[n] = "ip " + ip
				}
				for _, n := range slices.SortedFunc(maps.Keys(slicesOf), func(a, b Name) int { return compare(a, b) }) {
					sl := slicesOf[n]
					want[Name{n.Namespace, sl.Labels[discoveryv1.LabelServiceName]}] += " " + n.Name + "=" + sl.Endpoints[0].Addresses[0]
				}
				if !maps.Equal(want, followed) {
					t.Fatalf("followed %v, want %v", followed, want)
				}
			},
		})
	})
}

func compare(a, b Name) int {
	if a.key() < b.key() {
		return -1
	}
	return 1
}
