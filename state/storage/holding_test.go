package storage

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/storage"
)

// TestWatchOfOneWhoDoesNotRead varies how large what is written is: a watch holds the
// events in its buffer and some bytes behind these, says so, and loses none.
func TestWatchOfOneWhoDoesNotRead(t *testing.T) {
	t.Parallel()
	for _, size := range []int{10, 5 << 10, 100 << 10, 400 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			const events = 24
			_, s, _ := setup(t)
			first := create(t, s, "a")
			for i := range events {
				label(t, s, "a", fmt.Sprint(i, "-", strings.Repeat("x", size)))
			}
			var h Holding
			if h.Bytes() != 0 {
				t.Error("it tells of a watch that there is not")
			}
			w, err := s.Watch(WithHolding(t.Context(), &h), "/pods/ns/", storage.ListOptions{
				ResourceVersion: first.ResourceVersion, Recursive: true, Predicate: storage.Everything,
			})
			if err != nil {
				t.Fatal(err)
			}
			defer w.Stop()
			eventuallyOf(t, func() error {
				if n := len(w.ResultChan()); n < watchBuffer {
					return fmt.Errorf("%d events wait", n)
				}
				return nil
			})
			least := int64(watchBuffer * size)
			most := least + 1<<20 + 4*int64(size) + 32<<10
			for range 20 { // it does not take more by and by
				if n := h.Bytes(); n < least || n > most {
					t.Fatalf("it holds %d bytes, want %d to %d", n, least, most)
				}
				time.Sleep(time.Millisecond)
			}
			for i := range events {
				e := <-w.ResultChan()
				if got, _, _ := strings.Cut(e.Object.(*watchObject).GetObject().(*example.Pod).Labels["l"], "-"); got != fmt.Sprint(i) {
					t.Fatalf("event %d is of write %s", i, got)
				}
			}
			eventuallyOf(t, func() error {
				if n := h.Bytes(); n != 0 {
					return fmt.Errorf("it holds %d bytes when all is taken", n)
				}
				return nil
			})
		})
	}
}

// eventuallyOf waits until check returns nil.
func eventuallyOf(t *testing.T, check func() error) {
	t.Helper()
	err := errors.New("not looked")
	for until := time.Now().Add(2 * time.Minute); err != nil && time.Now().Before(until); time.Sleep(time.Millisecond) {
		err = check()
	}
	if err != nil {
		t.Fatal(err)
	}
}
