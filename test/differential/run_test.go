package differential

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/klog/v2"

	"timonel/reconcile"
)

var (
	runs    = flag.Int("runs", 0, "how many seeds of each family to run; 0: as many as the family says")
	from    = flag.Uint64("from", 1, "the first of them")
	seed    = flag.Uint64("seed", 0, "run this seed alone, and print its steps")
	verbose = flag.Bool("story", false, "with -seed: print what our reconcilers do")
	most    = flag.Int("most", 3, "how many seeds of a family may fail before the others are not run")
)

func TestMain(m *testing.M) {
	klog.SetLogger(logr.Discard())
	utilruntime.ErrorHandlers = nil // upstream tells of every conflict
	os.Exit(m.Run())
}

// family is the scenarios for one of upstream's controllers, or for some that work together.
type family struct {
	name  string
	seeds int // how many are run by default
	nodes int // how many nodes pods are on
	ours  []reconcile.Reconciler
	// slack is how much times may differ, because upstream waits before it works; nothing
	// else happens for some times as long.
	slack time.Duration
	// nudge makes upstream's controllers look at everything of theirs, because they wait
	// ever longer after something failed. Ours gets none: it must see for itself what changes.
	nudge    func(s *side)
	upstream controllers
	// chooses says that upstream's controllers choose among nodes at random.
	chooses  bool
	serve    func(s *side) // lets every pod get on by a step; nil: side.serve
	scenario func(r *rand.Rand) []step
}

// families are all, the most seeds for those of which the most can happen.
var families = []family{replicaSetFamily, replicationControllerFamily, deploymentFamily, jobFamily, cronJobFamily, statefulSetFamily, daemonSetFamily}

// calm is longer than controllers wait before they try again what has failed.
const calm = 12 * time.Minute

// step is something that happens on both sides at the same time, and how long nothing
// else happens then.
type step struct {
	what string
	do   func(s *side)
	wait time.Duration
}

func (s step) String() string { return fmt.Sprintf("%s, %s", s.what, s.wait) }

// then are the steps that end every scenario: everything that can get ready does.
func then(f family) (out []step) {
	out = append(out, step{"all that was away is back", func(s *side) {
		if s.permit(); s.away {
			s.start()
		}
	}, calm})
	serve := f.serve
	if serve == nil {
		serve = (*side).serve
	}
	for range 8 {
		out = append(out, step{"pods get on", serve, 3 * (time.Second + f.slack)})
	}
	return append(out, step{"nothing happens", func(*side) {}, 20 * time.Minute})
}

func TestDifferential(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			first, n := *from, f.seeds
			if *runs > 0 {
				n = *runs
			}
			if *seed != 0 {
				first, n = *seed, 1
			}
			var bad, raced atomic.Int64
			var mu sync.Mutex
			used := map[string]int{}
			t.Run("seeds", func(t *testing.T) {
				for s := first; s < first+uint64(n); s++ {
					t.Run(fmt.Sprint(s), func(t *testing.T) {
						t.Parallel()
						if bad.Load() >= int64(*most) {
							t.SkipNow()
						}
						steps := f.scenario(rand.New(rand.NewPCG(s, 0)))
						if *seed != 0 {
							t.Logf("steps:\n%s", list(steps))
						}
						found, allowed := play(t, f, steps)
						mu.Lock()
						for _, why := range allowed {
							used[why]++
						}
						mu.Unlock()
						if len(found) == 0 {
							return
						}
						// Ours does the same each time. What does not come back was a race among
						// upstream's goroutines, which cache and queue run ahead of each other.
						for range 2 {
							if again, _ := play(t, f, steps); len(again) == 0 {
								raced.Add(1)
								return
							}
						}
						bad.Add(1)
						steps, found = shrink(t, f, steps, found)
						t.Errorf("seed %d, with as few steps as it takes:\n%s\n%s\nagain: go test ./test/differential -run '/%s$' -seed %d -v", s, list(steps), strings.Join(found, "\n"), f.name, s)
					})
				}
			})
			if n := raced.Load(); n > 0 {
				t.Logf("%d seeds differed once, and not when they were played again", n)
			}
			for why, seeds := range used {
				if rare[why] && seeds > 1+n/100 {
					t.Errorf("%d of %d seeds differed as few may: %s", seeds, n, why)
				}
				t.Logf("%d of %d seeds differed as is allowed: %s", seeds, n, why)
			}
		})
	}
}

func list(steps []step) string {
	var b strings.Builder
	for i, s := range steps {
		fmt.Fprintf(&b, "  %2d %s\n", i+1, s)
	}
	return b.String()
}

// play does the steps on both sides and returns what differs after the first after which
// something does, and what of the differences on the way is allowed.
func play(t *testing.T, f family, steps []step) (found, allowed []string) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := newSides(t, f)
		settle(ours, theirs, time.Second)
		ours.look()
		theirs.look()
		all := slices.Concat(steps, then(f))
		var spammed []string               // of what upstream did not tell all
		ever := [2]map[string]bool{{}, {}} // what was told in all
		for i, step := range all {
			for _, s := range []*side{ours, theirs} {
				s.tick()
				step.do(s)
			}
			if f.nudge == nil {
				settle(ours, theirs, step.wait)
			} else { // what follows the first nudge may fail for something that is there by the second
				settle(ours, theirs, time.Second/2)
				f.nudge(theirs)
				settle(ours, theirs, step.wait-time.Second)
				f.nudge(theirs)
				settle(ours, theirs, time.Second/4)
			}
			a, b := ours.look(), theirs.look()
			for _, e := range a["events"] {
				ever[0][e] = true
			}
			for _, e := range b["events"] {
				ever[1][e] = true
			}
			if f.nudge != nil { // what is due at the end of the step is done on both sides before the next
				settle(ours, theirs, time.Second/4)
				f.nudge(theirs)
				settle(ours, theirs, 0)
			}
			spammed = append(spammed, b["spammed"]...)
			a, b, x, y := a, b, alike(a), alike(b) // compare changes them
			differences := compare(a, b, f.slack)
			if f.chooses && len(differences) > 0 && len(compare(x, y, f.slack)) == 0 {
				allowed = append(allowed, "which of several nodes comes first is up to the order of upstream's map")
				break
			}
			if i == len(all)-1 {
				differences = append(differences, compare(told(ever[0], spammed), told(ever[1], spammed), 0)...)
			}
			differences, why, end := permit(f.name, differences, ours.Refuse != nil)
			allowed = append(allowed, why...)
			if len(differences) > 0 {
				found = append([]string{fmt.Sprintf("  after step %d (%s), %s after the begin:", i+1, step.what, since(time.Now()))}, differences...)
				break
			}
			if end {
				break
			}
		}
	})
	slices.Sort(allowed)
	return found, slices.Compact(allowed)
}

// told returns all events as they are compared.
func told(events map[string]bool, spammed []string) seen {
	return seen{"events in all": slices.DeleteFunc(slices.Sorted(maps.Keys(events)), func(e string) bool {
		return slices.ContainsFunc(spammed, func(who string) bool { return strings.HasPrefix(e, who+":") })
	})}
}

// shrink leaves out the steps without which it fails all the same.
func shrink(t *testing.T, f family, steps []step, found []string) ([]step, []string) {
	kind := kindOf(found)
	for size := max(1, len(steps)/2); ; size /= 2 {
		for at := 0; at < len(steps); {
			fewer := slices.Concat(steps[:at], steps[min(len(steps), at+size):])
			if again, _ := play(t, f, fewer); len(again) > 0 && kindOf(again) == kind {
				steps, found = fewer, again
			} else {
				at += size
			}
		}
		if size <= 1 {
			return steps, found
		}
	}
}

// kindOf says what sort of a difference it is, so that shrinking keeps to it.
func kindOf(found []string) string {
	kind, _, _ := strings.Cut(found[1], " ")
	return kind
}
