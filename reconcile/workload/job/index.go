package job

import (
	"slices"
	"strconv"
	"strings"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
)

// none is the index of a pod that has none.
const none = -1

// span is the indexes from first to last, both included.
type span struct{ first, last int }

// indexes is a set of completion indexes as ordered spans with gaps between them.
type indexes []span

// parseIndexes reads what String writes, as far as it is below completions. Spans
// that make no sense are left out: a status can be written by anybody who may.
func parseIndexes(s string, completions int) indexes {
	if s == "" {
		return nil
	}
	var out indexes
	for part := range strings.SplitSeq(s, ",") {
		from, to, ranged := strings.Cut(part, "-")
		first, err := strconv.Atoi(from)
		if err != nil || first < 0 {
			continue
		}
		last := first
		if ranged {
			if last, err = strconv.Atoi(to); err != nil || last < first {
				continue
			}
		}
		if first >= completions {
			continue
		}
		out = append(out, span{first, min(last, completions-1)})
	}
	return indexes(nil).merge(out)
}

// merge returns the indexes that are in either.
func (x indexes) merge(other indexes) indexes {
	all := append(slices.Clone(x), other...)
	slices.SortFunc(all, func(a, b span) int { return a.first - b.first })
	var out indexes
	for _, s := range all {
		if n := len(out); n > 0 && s.first <= out[n-1].last+1 {
			out[n-1].last = max(out[n-1].last, s.last)
		} else {
			out = append(out, s)
		}
	}
	return out
}

// with returns the indexes and those of list, which may be in any order.
func (x indexes) with(list ...int) indexes {
	if len(list) == 0 {
		return x
	}
	spans := make(indexes, len(list))
	for i, n := range list {
		spans[i] = span{n, n}
	}
	return x.merge(spans)
}

// has says whether an index is among them.
func (x indexes) has(index int) bool {
	i, found := slices.BinarySearchFunc(x, index, func(s span, index int) int { return s.first - index })
	return found || i > 0 && x[i-1].last >= index
}

// total is how many there are.
func (x indexes) total() int {
	n := 0
	for _, s := range x {
		n += s.last - s.first + 1
	}
	return n
}

// String writes them as a Job's status does: "0,3-5,7,8".
func (x indexes) String() string {
	var out strings.Builder
	for _, s := range x {
		if out.Len() > 0 {
			out.WriteByte(',')
		}
		out.WriteString(strconv.Itoa(s.first))
		switch {
		case s.last == s.first+1:
			out.WriteByte(',')
		case s.last > s.first:
			out.WriteByte('-')
		default:
			continue
		}
		out.WriteString(strconv.Itoa(s.last))
	}
	return out.String()
}

// missing returns the first n indexes below completions that are not among them.
func (x indexes) missing(n, completions int) []int {
	var out []int
	next := 0
	for _, s := range append(slices.Clone(x), span{completions, completions}) {
		for ; next < min(s.first, completions) && len(out) < n; next++ {
			out = append(out, next)
		}
		next = max(next, s.last+1)
	}
	return out
}

// overlap is how many indexes are in both.
func (x indexes) overlap(other indexes) int {
	n := 0
	for i, j := 0, 0; i < len(x) && j < len(other); {
		n += max(0, min(x[i].last, other[j].last)-max(x[i].first, other[j].first)+1)
		if x[i].last < other[j].last {
			i++
		} else {
			j++
		}
	}
	return n
}

// indexOf returns the index that a pod works on, or none.
func indexOf(pod *corev1.Pod) int {
	n, err := strconv.Atoi(pod.Annotations[batchv1.JobCompletionIndexAnnotation])
	if err != nil || n < 0 {
		return none
	}
	return n
}

// failuresOf returns how often pods of the index failed before this one, those that
// count and those that a policy ignores.
func failuresOf(pod *corev1.Pod) (counted, ignored int32) {
	return countOf(pod, batchv1.JobIndexFailureCountAnnotation), countOf(pod, batchv1.JobIndexIgnoredFailureCountAnnotation)
}

func countOf(pod *corev1.Pod, annotation string) int32 {
	n, err := strconv.ParseInt(pod.Annotations[annotation], 10, 32)
	if err != nil || n < 0 {
		return 0
	}
	return int32(n)
}
