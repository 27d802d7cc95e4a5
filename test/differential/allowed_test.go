package differential

import "regexp"

// allowance is a difference that is meant.
type allowance struct {
	family string // "" for all
	line   string // a regular expression that the whole line of the difference matches
	why    string
	ends   bool // what follows differs by that, and is not compared
}

var allowances = []allowance{
	{
		line: `\S+ \S+ status.conditions\[ReplicaFailure\].lastTransitionTime is .*`,
		why:  "the pass after the one that was refused writes the condition, a second later",
	},
	{
		line: `events of (ours|upstream) alone: .*: Warning Failed(Create|Delete)`,
		why:  "how often it is tried again what the API refuses is not compared, nor in which step that is told of; that it is told at all is",
	},
	{
		line: `Pod \S+: spec.nodeName is "n\d" here, and "n\d" upstream`,
		why:  "which of several pods that are alike but for their nodes, which have as many, is deleted is up to the order of upstream's map",
		ends: true,
	},
}

// What is not played, because it differs for a reason:
//
//   - Pods that fail within a minute of their creation. A ReplicaSet of ours waits longer
//     each time before it replaces them, upstream's does not: workload.holdBack says why.
//   - Pods on several nodes of a ReplicaSet or ReplicationController that nobody owns, when
//     it has too many. Kubernetes' documentation says that pods that share a node are deleted
//     first, and ours are; upstream does so only for a ReplicaSet that has an owner.

var permitted = func() (out []*regexp.Regexp) {
	for _, a := range allowances {
		out = append(out, regexp.MustCompile("^(?:"+a.line+")$"))
	}
	return out
}()

// permit returns the differences that are not allowed, the reasons of those that are, and
// whether what follows is not to be compared.
func permit(family string, differences []string) (left, why []string, end bool) {
next:
	for _, d := range differences {
		for i, a := range allowances {
			if (a.family == "" || a.family == family) && permitted[i].MatchString(d) {
				why = append(why, a.why)
				end = end || a.ends
				continue next
			}
		}
		left = append(left, d)
	}
	return left, why, end
}
