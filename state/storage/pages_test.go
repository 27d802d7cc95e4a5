package storage

import (
	"errors"
	"fmt"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/storage"
)

// TestOldListInAQuietCluster goes on with a list in pages, in a state that does not
// change, as upstream's conformance test of chunks does: until five minutes after the
// first page it must go on, then it must be told to go on with an inconsistent token,
// whose list is of a newer revision.
func TestOldListInAQuietCluster(t *testing.T) {
	clock := time.Unix(1_000_000, 0)
	ctx, s, b := setup(t, func(c *Config) { c.Now = func() time.Time { return clock } })
	for i := range 10 {
		pod := &example.Pod{}
		pod.Name, pod.Namespace = fmt.Sprint("pod", i), "ns"
		if err := s.Create(ctx, "/pods/ns/"+pod.Name, pod, nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	page := func(token string) (*example.PodList, error) {
		p := storage.Everything
		p.Limit, p.Continue = 3, token
		out := &example.PodList{}
		return out, s.GetList(ctx, "/pods/", storage.ListOptions{Predicate: p, Recursive: true}, out)
	}
	clock = clock.Add(time.Hour) // the revision is old, but no list at it is
	first, err := page("")
	if err != nil {
		t.Fatal(err)
	}
	before := b.Store().View().Revision()
	for range 15 {
		second, err := page(first.Continue)
		if err != nil || second.Items[0].Name != "pod3" || second.ResourceVersion != first.ResourceVersion {
			t.Fatalf("%v, %v", second, err)
		}
		clock = clock.Add(20 * time.Second)
	}
	if now := b.Store().View().Revision(); now != before {
		t.Errorf("revision %d became %d", before, now)
	}
	clock = clock.Add(20 * time.Second)
	_, err = page(first.Continue)
	var status apierrors.APIStatus
	if !apierrors.IsResourceExpired(err) || !errors.As(err, &status) || status.Status().ListMeta.Continue == "" {
		t.Fatalf("after five minutes: %v", err)
	}
	token, names := status.Status().ListMeta.Continue, []string(nil)
	for token != "" {
		rest, err := page(token)
		if err != nil || rest.ResourceVersion == first.ResourceVersion {
			t.Fatalf("at %s, the first page was at %s: %v", rest.ResourceVersion, first.ResourceVersion, err)
		}
		for i := range rest.Items {
			names = append(names, rest.Items[i].Name)
		}
		token = rest.Continue
	}
	if fmt.Sprint(names) != "[pod3 pod4 pod5 pod6 pod7 pod8 pod9]" {
		t.Errorf("the rest is %v", names)
	}
	if now := b.Store().View().Revision(); now != before+1 {
		t.Errorf("one write was due, revision %d became %d", before, now)
	}
}
