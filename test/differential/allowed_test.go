package differential

import "regexp"

// allowance is a difference that is meant.
type allowance struct {
	family string // "" for all
	line   string // a regular expression that the whole line of the difference matches
	why    string
	// refused says that it is only while the API refuses something.
	refused bool
	ends    bool // what follows differs by that, and is not compared
	// rare says that it may be in one of a hundred seeds: more would be a bug.
	rare bool
}

var allowances = []allowance{
	{
		line: `\S+ \S+ status.conditions\[ReplicaFailure\].last(Transition|Update)Time is .*`,
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
	{
		line:    `\S+ \S+: status.availableReplicas is \d+ here, and (nothing|\d+) upstream`,
		why:     "while a ReplicaSet of upstream's is refused something it does not look whether its pods have become available; ours does",
		refused: true,
	},
	{
		family: "statefulset",
		line:   `events( in all)? of upstream alone: StatefulSet \S+: (Normal SuccessfulUpdate|Warning FailedUpdate)`,
		why:    "upstream gives the claims that it has just made their owners in the same pass, which tells of a pod's update, or of a conflict when its cache lacks what it wrote; ours makes them first and says nothing about an update of a claim that went well",
	},
	{
		family: "statefulset",
		line:   `events of upstream alone: StatefulSet \S+: Warning ConflictingController`,
		why:    "upstream tells so each time that it looks at a pending pod; in all it is compared",
	},
	{
		family: "replicaset",
		line:   `Pod \S+: metadata.creationTimestamp is .*`,
		why:    "the story that ours is told by waits for a second after something was refused, even when the ReplicaSet is edited meanwhile; the runner does not",
		ends:   true, rare: true,
	},
	{
		family: "job",
		line:   `(Job \S+: status.(active|ready) is .*|(Pod|requests|events)( in all)? of (ours|upstream) alone: (Job \S+: Normal SuccessfulCreate|create pods .*|web-\S* .*"phase":"Pending".*))`,
		why:    "a pod is replaced sooner or later: ours reads how often pods have failed from those that are there and count, upstream from its memory, where those are that vanished, and those of indexes that there are no more",
		ends:   true, rare: true,
	},
	{
		family: "deployment",
		line:   `ReplicaSet \S+: metadata.generation is .*`,
		why:    "ours changes a ReplicaSet once where upstream does so twice, for minReadySeconds or unhealthy pods and then for the size",
	},
	{
		family: "deployment",
		line:   `events( in all)? of (ours|upstream) alone: Deployment \S+: Warning DeploymentRollback(RevisionNotFound|TemplateUnchanged)`,
		why:    "upstream makes the ReplicaSet of the newest template before it looks for the revision to go back to; neither goes anywhere",
	},
	{
		family: "deployment",
		line:   `(requests of (ours|upstream) alone: (create|delete) pods .*|events( in all)? of upstream alone: ReplicaSet \S+: Normal Successful(Create|Delete))`,
		why:    "ours has decided all about a Deployment before its ReplicaSets act; upstream's may create a pod and delete it again. What pods there are then is compared",
	},
	{
		family: "cronjob",
		line:   `events( in all)? of upstream alone: CronJob \S+: (Normal MissingJob|Warning FailedGet)`,
		why:    "upstream deletes a Job to replace it, looks again before its cache has the status without it, and misses the Job",
	},
	{
		family: "job",
		line:   `Pod \S+: metadata.creationTimestamp is .*`,
		why:    "ours reads how often pods have failed from the pods that are there, upstream from its memory: a pod that is gone delays nothing here, and an upstream controller that starts anew waits for nothing. Steps see to it that pods are missing or there alike",
	},
	{
		family: "deployment",
		line: `Deployment \S+: status.conditions\[Progressing\].(last(Transition|Update)Time is .*|` +
			`(message|reason|status) is "(ReplicaSet \\".*\\" has timed out progressing.|ProgressDeadlineExceeded|False)" here, and "(ReplicaSet \\".*\\" is progressing.|ReplicaSetUpdated|True)" upstream)`,
		why: "upstream's ReplicaSet says for a moment that a pod is missing, and the Deployment takes the pod that replaces it for progress of the rollout; ours says so once the pod is there",
	},
}

// What is not played, because it differs for a reason:
//
//   - Pods that fail within a minute of their creation. A ReplicaSet of ours waits longer
//     each time before it replaces them, upstream's does not: workload.holdBack says why.
//   - Pods on several nodes of a ReplicaSet or ReplicationController that nobody owns, when
//     it has too many. Kubernetes' documentation says that pods that share a node are deleted
//     first, and ours are; upstream does so only for a ReplicaSet that has an owner.
//   - That the API refuses to delete pods of a Deployment, DaemonSet or Job. A DaemonSet of
//     upstream's that surges makes others beside ended pods which it cannot delete. Pods that were to be
//     deleted and are there count against maxSurge here, and not upstream; a Job of ours says
//     that it is to fail before it deletes pods, upstream's after.
//   - That it refuses to create pods of a Deployment or DaemonSet: while a ReplicaSet of upstream's cannot,
//     it does not look whether its pods have become available, nor does a DaemonSet delete old
//     revisions. Ours does.
//   - A pod that is in the way of a pod of a StatefulSet that is parallel or has claims.
//     Upstream makes none of the others, because it stops at the first that is refused, and
//     makes the claims of a pod that cannot be; ours makes the others, and no claims.
//   - A claim that is being deleted and held, of a parallel StatefulSet. Upstream neither
//     scales down nor rolls until it is gone, which it is not while a pending pod uses it;
//     ours goes on with the other pods, and so comes out of it by itself.
//   - A StatefulSet that is deleted in the foreground: upstream makes its revision anew each
//     time that the garbage collector takes it; ours makes none for what is going.
//   - A Job that is deleted in the foreground: whether its pods are counted before they are
//     collected is a race with the garbage collector.
//   - Changes of a Deployment while its controllers are away: which of Deployment and
//     ReplicaSet is looked at first when they are back decides what is done on the way.

var permitted = func() (out []*regexp.Regexp) {
	for _, a := range allowances {
		out = append(out, regexp.MustCompile("^(?:"+a.line+")$"))
	}
	return out
}()

// rare are the reasons that few seeds may have.
var rare = func() map[string]bool {
	out := map[string]bool{}
	for _, a := range allowances {
		if a.rare {
			out[a.why] = true
		}
	}
	return out
}()

// permit returns the differences that are not allowed, the reasons of those that are, and
// whether what follows is not to be compared.
func permit(family string, differences []string, refusing bool) (left, why []string, end bool) {
next:
	for _, d := range differences {
		for i, a := range allowances {
			if (a.family == "" || a.family == family) && (!a.refused || refusing) && permitted[i].MatchString(d) {
				why = append(why, a.why)
				end = end || a.ends
				continue next
			}
		}
		left = append(left, d)
	}
	return left, why, end
}
