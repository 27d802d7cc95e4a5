package history

import (
	"testing"
	"time"
)

func TestKept(t *testing.T) {
	t.Parallel()
	const bound = 4 * time.Second
	write := Operation{Kind: Create, Key: "k", Call: time.Second, Return: 2 * time.Second, Outcome: Outcome{Status: OK, Revision: 7}}
	for name, test := range map[string]struct {
		stream Stream
		events []Event
		kept   bool
	}{
		"open for longer":              {Stream{After: 6, Opened: 1, Closed: 7 * time.Second}, nil, true},
		"ended in time":                {Stream{After: 6, Opened: 1, Closed: 5 * time.Second}, nil, false},
		"opened after the write":       {Stream{After: 6, Opened: 3 * time.Second, Closed: 9 * time.Second}, nil, false},
		"begins behind the write":      {Stream{After: 7, Opened: 1, Closed: 9 * time.Second}, nil, false},
		"told of it":                   {Stream{After: 6, Opened: 1, Closed: 9 * time.Second}, []Event{{Revision: 7, At: 5 * time.Second}}, false},
		"told of it too late":          {Stream{After: 6, Opened: 1, Closed: 9 * time.Second}, []Event{{Revision: 7, At: 7 * time.Second}}, true},
		"told of one before it":        {Stream{After: 5, Opened: 1, Closed: 9 * time.Second}, []Event{{Revision: 6, At: time.Second}}, true},
		"told of a later one, in time": {Stream{After: 6, Opened: 1, Closed: 9 * time.Second}, []Event{{Revision: 8, At: 3 * time.Second}, {Revision: 9, At: 8 * time.Second}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			h := History{Operations: []Operation{write}, Watches: []Watch{{Name: "w", Events: test.events, Streams: []Stream{test.stream}}}}
			if got := Kept(h, bound); (len(got) > 0) != test.kept {
				t.Errorf("says %q", got)
			}
		})
	}
}
