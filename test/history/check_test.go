package history

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func op(kind Kind, key, value string, condition int64, call, end time.Duration, out Outcome) Operation {
	return Operation{Kind: kind, Key: key, Value: value, If: condition, Call: call, Return: end, Outcome: out}
}

func wrote(revision int64) Outcome { return Outcome{Status: OK, Revision: revision} }
func read(value string, revision int64) Outcome {
	return Outcome{Status: OK, Found: true, Value: value, Revision: revision}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	absent, refused, unknown := Outcome{Status: OK}, Outcome{Status: Refused}, Outcome{Status: Unknown}
	listed := func(at int64, items map[string]Item) Outcome {
		return Outcome{Status: OK, Revision: at, Items: items}
	}
	seen := []Event{{Key: "a", Value: "1", Revision: 5, At: 3}, {Key: "a", Value: "2", Revision: 7, At: 5}}
	base := []Operation{op(Create, "a", "1", 0, 1, 2, wrote(5)), op(Update, "a", "2", 5, 3, 4, wrote(7))}
	for name, tt := range map[string]struct {
		ops    []Operation
		events []Event
		want   string // "" for a good history
	}{
		"good":                         {ops: append(base[:2:2], op(Get, "a", "", 0, 5, 6, read("2", 7)), op(Delete, "a", "", 7, 7, 8, absent), op(Get, "a", "", 0, 9, 10, absent))},
		"stale read":                   {ops: append(base[:2:2], op(Get, "a", "", 0, 5, 6, read("1", 5))), want: "linearizable"},
		"read of a concurrent write":   {ops: []Operation{base[0], op(Update, "a", "2", 5, 3, 9, wrote(7)), op(Get, "a", "", 0, 5, 6, read("1", 5))}},
		"lost write":                   {ops: append(base[:2:2], op(Get, "a", "", 0, 5, 6, absent)), want: "linearizable"},
		"condition broken":             {ops: append(base[:2:2], op(Update, "a", "3", 5, 5, 6, wrote(9))), want: "linearizable"},
		"condition refused":            {ops: append(base[:2:2], op(Update, "a", "3", 5, 5, 6, refused))},
		"refused without a reason":     {ops: append(base[:2:2], op(Update, "a", "3", 7, 5, 6, refused)), want: "linearizable"},
		"unknown write that was done":  {ops: append(base[:2:2], op(Update, "a", "3", 7, 5, 6, unknown), op(Get, "a", "", 0, 7, 8, read("3", 9)))},
		"unknown write, not done":      {ops: append(base[:2:2], op(Update, "a", "3", 7, 5, 6, unknown), op(Get, "a", "", 0, 7, 8, read("2", 7)))},
		"unknown write, done late":     {ops: append(base[:2:2], op(Update, "a", "3", 7, 5, 6, unknown), op(Get, "a", "", 0, 7, 8, read("2", 7)), op(Get, "a", "", 0, 9, 10, read("3", 9)))},
		"unknown write, undone":        {ops: append(base[:2:2], op(Update, "a", "3", 7, 5, 6, unknown), op(Get, "a", "", 0, 7, 8, read("3", 9)), op(Get, "a", "", 0, 9, 10, read("2", 7))), want: "linearizable"},
		"read of what nobody wrote":    {ops: append(base[:2:2], op(Get, "a", "", 0, 5, 6, read("9", 7))), want: "linearizable"},
		"revision used twice":          {ops: append(base[:2:2], op(Create, "b", "3", 0, 5, 6, wrote(7))), want: "both"},
		"revisions against time":       {ops: append(base[:2:2], op(Create, "b", "3", 0, 5, 6, wrote(6))), want: "called later"},
		"list":                         {ops: append(base[:2:2], op(List, "", "", 0, 5, 6, listed(7, map[string]Item{"a": {"2", 7}})))},
		"list of the past":             {ops: append(base[:2:2], op(List, "", "", 0, 5, 6, listed(6, map[string]Item{"a": {"1", 5}}))), want: "older than"},
		"list that lacks":              {ops: append(base[:2:2], op(List, "", "", 0, 5, 6, listed(7, nil))), want: "nobody deleted"},
		"list with an old item":        {ops: append(base[:2:2], op(List, "", "", 0, 5, 6, listed(7, map[string]Item{"a": {"1", 5}}))), want: "lacks 7"},
		"list with another value":      {ops: append(base[:2:2], op(List, "", "", 0, 5, 6, listed(7, map[string]Item{"a": {"x", 7}}))), want: "which was"},
		"list with an item to come":    {ops: append(base[:2:2], op(List, "", "", 0, 5, 6, listed(7, map[string]Item{"a": {"3", 8}}))), want: "at 8"},
		"list after an unknown delete": {ops: append(base[:2:2], op(Delete, "a", "", 7, 5, 6, unknown), op(List, "", "", 0, 7, 8, listed(9, nil)))},
		"list at a revision":           {ops: append(base[:2:2], op(ListAt, "", "", 5, 5, 6, listed(5, map[string]Item{"a": {"1", 5}})))},
		"list at another revision":     {ops: append(base[:2:2], op(ListAt, "", "", 5, 5, 6, listed(7, map[string]Item{"a": {"2", 7}}))), want: "asked for at revision 5"},
		"list at a revision, too new":  {ops: append(base[:2:2], op(ListAt, "", "", 5, 5, 6, listed(5, map[string]Item{"a": {"2", 7}}))), want: "at 7"},
		"list and watch":               {ops: append(base[:2:2], op(ListAt, "", "", 6, 5, 6, listed(6, map[string]Item{"a": {"1", 5}}))), events: seen},
		"list lacks what was watched":  {ops: append(base[:2:2], op(Delete, "a", "", 7, 5, 6, unknown), op(ListAt, "", "", 7, 7, 8, listed(7, nil))), events: seen, want: "saw written at 7"},
		"list has what was deleted":    {ops: append(base[:2:2], op(Delete, "a", "", 7, 5, 6, absent), op(ListAt, "", "", 9, 7, 8, listed(9, map[string]Item{"a": {"2", 7}}))), events: append(seen[:2:2], Event{Delete: true, Key: "a", Revision: 9, At: 6}), want: "saw deleted at 9"},
		"list differs from the watch":  {ops: append(base[:1:1], op(Update, "a", "2", 5, 3, 4, unknown), op(ListAt, "", "", 7, 7, 8, listed(7, map[string]Item{"a": {"1", 5}}))), events: seen, want: `where w saw "2" of 7`},
		"watch":                        {ops: base, events: []Event{{Key: "a", Value: "1", Revision: 5, At: 3}, {Key: "a", Value: "2", Revision: 7, At: 5}}},
		"watch that lost an event":     {ops: base, events: []Event{{Key: "a", Value: "2", Revision: 7, At: 5}}, want: "did not see revision 5"},
		"watch with an event twice":    {ops: base, events: []Event{{Key: "a", Value: "1", Revision: 5, At: 3}, {Key: "a", Value: "1", Revision: 5, At: 3}}, want: "twice"},
		"watch out of order":           {ops: base, events: []Event{{Key: "a", Value: "2", Revision: 7, At: 5}, {Key: "a", Value: "1", Revision: 5, At: 6}}, want: "after 7"},
		"watch of the future":          {ops: base, events: []Event{{Key: "a", Value: "1", Revision: 5, At: 0}}, want: "before its write"},
		"watch of another value":       {ops: base, events: []Event{{Key: "a", Value: "x", Revision: 5, At: 3}}, want: "where"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := History{Operations: tt.ops}
			if tt.events != nil {
				h.Watches = []Watch{{Name: "w", Events: tt.events}}
			}
			r := Check(h, time.Minute)
			require.False(t, r.Undecided)
			if tt.want == "" {
				require.Empty(t, r.Violations)
			} else {
				require.Contains(t, strings.Join(r.Violations, "; "), tt.want)
			}
			require.NoError(t, r.Visualize(filepath.Join(t.TempDir(), "page.html")))
		})
	}
}

func TestSaveAndLoad(t *testing.T) {
	t.Parallel()
	var r Recorder
	o := r.Begin(1, Operation{Kind: Create, Key: "a", Value: "1"})
	r.End(o, wrote(5))
	r.Begin(2, Operation{Kind: Get, Key: "a"})
	w := r.Watch("w", 4)
	r.Saw(w, Event{Key: "a", Value: "1", Revision: 5})
	path := filepath.Join(t.TempDir(), "history.json")
	require.NoError(t, r.History().Save(path))
	got, err := Load(path)
	require.NoError(t, err)
	require.Equal(t, r.History(), got)
	require.Equal(t, Unknown, got.Operations[1].Outcome.Status, "not returned")
	require.Empty(t, Check(got, time.Minute).Violations)
	_, err = Load(path + "x")
	require.Error(t, err)
}
