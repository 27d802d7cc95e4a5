package main

import (
	"strings"

	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"

	"timonel/gossip"
	"timonel/trust"
)

// collector tells, on /metrics of the API, what is Timonel's own: the log, the
// state and the members. What the Kubernetes API says of itself is upstream's.
type collector struct {
	metrics.BaseStableCollector
	k *controller
}

func desc(name, help string, labels ...string) *metrics.Desc {
	return metrics.NewDesc("timonel_"+name, help, labels, nil, metrics.ALPHA, "")
}

var (
	descLeader           = desc("raft_is_leader", "1 on the controller that leads.")
	descTerm             = desc("raft_term", "The Raft term.")
	descCommit           = desc("raft_commit_index", "The last log entry known to be committed.")
	descApplied          = desc("raft_applied_index", "The last log entry that this controller has applied.")
	descLast             = desc("raft_last_index", "The last entry of this controller's log.")
	descFirst            = desc("raft_first_index", "The first entry of this controller's log.")
	descSnapshot         = desc("raft_snapshot_index", "The last log entry that the newest snapshot holds.")
	descSnapshotSize     = desc("raft_snapshot_bytes", "The size of the newest snapshot.")
	descMembers          = desc("raft_members", "Members of the Raft configuration.", "role")
	descAppends          = desc("log_appends_total", "Appends to the log on disk, each of one or more entries.")
	descEntries          = desc("log_entries_total", "Entries appended to the log on disk.")
	descAppendTime       = desc("log_append_seconds_total", "Time that appends took, syncs included.")
	descAppendMax        = desc("log_append_max_seconds", "The longest append since the start.")
	descFsync            = desc("log_fsync_seconds", "The median time of a sync, measured at the start.")
	descDisk             = desc("log_disk_ok", "0 while the log cannot be written: the disk is full, broken or stalls.")
	descCorrupt          = desc("state_corrupt", "1 when this controller stopped because its data is damaged or differs from the majority's.")
	descProblems         = desc("problems", "Problems that `timonel status` shows of this controller.")
	descRevision         = desc("state_revision", "The revision of the state.")
	descKeys             = desc("state_keys", "Keys in the state.")
	descBytes            = desc("state_bytes", "Bytes of keys and values in the state.")
	descLimit            = desc("memory_limit_bytes", "The bound of a part of this controller's memory.", "share")
	descConns            = desc("port_connections", "Open connections of a port.", "port")
	descConnsLimit       = desc("port_connections_limit", "How many connections a port may have.", "port")
	descConnsEnded       = desc("port_connections_closed_total", "Connections closed to keep a port within its limits: whose handshake was not finished, that gave way to others, that found no room.", "port", "reason")
	descHeld             = desc("memory_held_bytes", "What a part of this controller's memory holds.", "share")
	descRefused          = desc("state_refused_total", "Writes that this controller refused as leader because the state was full.")
	descStrangers        = desc("api_strangers", "Requests to the API that are served and of whom it is not known who makes them.")
	descStrangersRefused = desc("api_strangers_refused_total", "Requests to the API that were refused because there were too many, of one address or in all, of whom it was not known who makes them.")
	descBodiesRefused    = desc("api_bodies_refused_total", "Requests to the API that were refused because the bodies of others took all the memory that there is for them.")
	descTunnelsRefused   = desc("api_tunnels_refused_total", "Logs, commands and forwarded ports that were refused because too many were open.")
	descAnswersRefused   = desc("api_answers_refused_total", "Requests to the API that were refused because the answers to others took all the memory that there is for them.")
	descCut              = desc("watches_cut_total", "Watches that were cut off because their clients did not read and what waited for such clients was too much, or that ended or were refused because all of them held too much.")
	descFull             = desc("state_full", "1 while writes that make the state larger are refused.")
	descCompacted        = desc("state_compact_revision", "The oldest revision that lists in pages go on at, where nothing was cut beside.")
	descHistoryAge       = desc("history_age_seconds", "How long a revision can be watched from after it was the newest, no more than --history-age: for all resources that are not told of with a prefix of keys, which held so much that they lost some.", "prefix")
	descHistory          = desc("history_changes", "Changes in the history that watches resume from.")
	descHistoryBytes     = desc("history_bytes", "What the history holds beside the state; large is the part of values beyond 4 KiB, spilled the part that is not in memory but in files of --data-dir, disk the size of those.", "part")
	descHistoryLimit     = desc("history_limit_bytes", "The bounds of history_bytes.", "part")
	descExpiry           = desc("certificate_expiry_timestamp_seconds", "When a certificate that this controller has ends: of the authorities ca and front-proxy-ca, of its cluster port and Raft (cluster), of the API that it serves (api).", "of")
	descGossip           = desc("gossip_members", "Members of the gossip pool.", "role", "state")
	descGossipKeys       = desc("gossip_keys", "Keys that a pool of gossip takes: more than one while they are rotated.", "pool")
	descNetworkStreams   = desc("network_feed_streams", "Agents that are told of Services, endpoints and nodes by this controller.")
	descNetworkItems     = desc("network_feed_items", "Services, EndpointSlices and nodes that every node is told of.")
	descNetworkPolicies  = desc("network_feed_policies", "Network policies, and parts of the groups of pods that they name: a node is told of those that concern its pods.")
	descNetworkWithheld  = desc("network_feed_withheld", "Objects that nodes are not told of, and policies that they are told of without what they allow, because they are too large, or too much with the others; the log names them.")
	descNetworkSent      = desc("network_feed_sent_items_total", "Items sent to agents, removals included.")
	descNetworkBatches   = desc("network_feed_batches_total", "Batches sent to agents.")
	descNetworkLists     = desc("network_feed_lists_total", "Times that an agent was sent what differed from what it said to have.")
	descNetworkTaken     = desc("network_feed_taken_total", "Batches of which an agent said that it has them.")
	descNetworkLag       = desc("network_feed_lag_seconds_total", "The time of those, from when they could be sent.")
	descNetworkLagMax    = desc("network_feed_lag_max_seconds", "The longest such time in the last minute or two.")
	descGossipRefused    = desc("gossip_refused_total", "What came by gossip and was not taken, by pool and reason.", "pool", "reason")
)

// maxPrefixes bounds the resources that are told of one by one.
const maxPrefixes = 16

// DescribeWithStability implements metrics.StableCollector.
func (c *collector) DescribeWithStability(to chan<- *metrics.Desc) {
	for _, d := range []*metrics.Desc{descLeader, descTerm, descCommit, descApplied, descLast, descFirst, descSnapshot, descSnapshotSize,
		descMembers, descAppends, descEntries, descAppendTime, descAppendMax, descFsync, descDisk, descCorrupt, descProblems,
		descRevision, descKeys, descBytes, descCompacted, descLimit, descHeld, descConns, descConnsLimit, descConnsEnded, descRefused, descFull, descCut, descStrangers, descStrangersRefused, descBodiesRefused, descTunnelsRefused, descAnswersRefused, descHistoryAge, descHistory, descHistoryBytes,
		descNetworkStreams, descNetworkItems, descNetworkPolicies, descNetworkWithheld, descNetworkSent, descNetworkBatches, descNetworkLists, descNetworkTaken, descNetworkLag, descNetworkLagMax,
		descHistoryLimit, descExpiry, descGossip, descGossipKeys, descGossipRefused} {
		to <- d
	}
}

// CollectWithStability implements metrics.StableCollector.
func (c *collector) CollectWithStability(to chan<- metrics.Metric) {
	gauge := func(d *metrics.Desc, value float64, labels ...string) {
		to <- metrics.NewLazyConstMetric(d, metrics.GaugeValue, value, labels...)
	}
	counter := func(d *metrics.Desc, value float64) {
		to <- metrics.NewLazyConstMetric(d, metrics.CounterValue, value)
	}
	flag := func(d *metrics.Desc, set bool) {
		value := 0.0
		if set {
			value = 1
		}
		gauge(d, value)
	}
	k := c.k
	s := k.replica.Status()
	flag(descLeader, s.Role == "leader")
	gauge(descTerm, float64(s.Term))
	gauge(descCommit, float64(s.CommitIndex))
	gauge(descApplied, float64(s.AppliedIndex))
	gauge(descLast, float64(s.LastIndex))
	gauge(descFirst, float64(s.FirstIndex))
	gauge(descSnapshot, float64(s.SnapshotIndex))
	gauge(descSnapshotSize, float64(s.SnapshotSize))
	voters := 0
	for _, m := range s.Members {
		if m.Voter {
			voters++
		}
	}
	gauge(descMembers, float64(voters), "voter")
	gauge(descMembers, float64(len(s.Members)-voters), "non-voter")
	counter(descAppends, float64(s.Disk.Appends))
	counter(descEntries, float64(s.Disk.Entries))
	counter(descAppendTime, s.Disk.Total.Seconds())
	gauge(descAppendMax, s.Disk.Max.Seconds())
	gauge(descFsync, s.Fsync.Seconds())
	flag(descDisk, k.replica.DiskErr() == nil)
	flag(descCorrupt, k.replica.Err() != nil)
	gauge(descProblems, float64(len(s.Problems)))
	view := k.store.View()
	gauge(descRevision, float64(view.Revision()))
	gauge(descKeys, float64(view.Len()))
	gauge(descBytes, float64(view.Bytes()))
	gauge(descCompacted, float64(k.store.CompactRevision()))
	history := k.store.History()
	quota := k.quota.Status()
	log := k.replica.Held()
	reports, told := k.agents.ReportBytes(), k.agents.NetworkFigures()
	gauge(descNetworkStreams, float64(told.Streams))
	gauge(descNetworkItems, float64(told.Items))
	gauge(descNetworkPolicies, float64(told.Policies))
	gauge(descNetworkWithheld, float64(told.Withheld))
	counter(descNetworkSent, float64(told.SentItems))
	counter(descNetworkBatches, float64(told.Batches))
	counter(descNetworkLists, float64(told.Lists))
	counter(descNetworkTaken, float64(told.Taken))
	counter(descNetworkLag, told.Lag.Seconds())
	gauge(descNetworkLagMax, told.LongestLag.Seconds())
	slow, cut := k.api.SlowWatches()
	open, mostOpen := k.api.Watches()
	counter(descCut, float64(cut))
	bodies, refused := k.api.Bodies()
	counter(descBodiesRefused, float64(refused))
	tunnels, refused := k.api.NodeStreams()
	counter(descTunnelsRefused, float64(refused))
	answers, refused := k.api.Answers()
	counter(descAnswersRefused, float64(refused))
	strangers, refused := k.api.Strangers()
	gauge(descStrangers, float64(strangers))
	counter(descStrangersRefused, float64(refused))
	connections := int64(0)
	for _, l := range k.listeners {
		stats := l.Stats()
		connections += int64(stats.Open) * connectionCost
		gauge(descConns, float64(stats.Open), l.Name())
		gauge(descConnsLimit, float64(l.Capacity()), l.Name())
		for reason, n := range map[string]uint64{"unfinished": stats.Unfinished, "evicted": stats.Evicted, "refused": stats.Refused} {
			to <- metrics.NewLazyConstMetric(descConnsEnded, metrics.CounterValue, float64(n), l.Name(), reason)
		}
	}
	for share, bytes := range map[string][2]int64{
		"all": {k.shares.memory, 0}, "state": {quota.Limit, quota.Used + quota.InFlight},
		"history": {history.Limit, history.Bytes - history.Spilled}, "objects": {k.shares.objects, k.decoded.Bytes()},
		"log-cache": {k.shares.logCache, log.LogCache}, "log-queue": {k.shares.queue, log.Queue},
		"proposals": {k.shares.proposals, log.Proposals}, "replication": {log.ReplicationLimit, log.Replication},
		"watches": {k.shares.watches, slow}, "open-watches": {mostOpen, open}, "bodies": {k.shares.bodies, bodies}, "answers": {k.shares.answers, answers}, "reports": {k.shares.reports, reports},
		"usage": {k.shares.usage, k.agents.UsageBytes()}, "tunnels": {k.shares.tunnels, tunnels},
		"network": {k.shares.network, told.Bytes + told.PolicyBytes}, "connections": {k.shares.connections, connections},
	} {
		gauge(descLimit, float64(bytes[0]), share)
		if share == "all" {
			bytes[1], _ = residentMemory()
		}
		if bytes[1] >= 0 {
			gauge(descHeld, float64(bytes[1]), share)
		}
	}
	counter(descRefused, float64(quota.Refused))
	flag(descFull, quota.Full)
	gauge(descHistoryAge, history.Age.Seconds(), "")
	for prefix, age := range history.Worst(maxPrefixes) {
		gauge(descHistoryAge, age.Seconds(), prefix)
	}
	gauge(descHistory, float64(history.Changes))
	gauge(descHistoryBytes, float64(history.Bytes), "all")
	gauge(descHistoryBytes, float64(history.Large), "large")
	gauge(descHistoryBytes, float64(history.Spilled), "spilled")
	gauge(descHistoryBytes, float64(history.Disk), "disk")
	gauge(descHistoryLimit, float64(history.Limit), "all")
	gauge(descHistoryLimit, float64(history.LargeLimit), "large")
	for of, at := range k.certificates.expiries() {
		gauge(descExpiry, float64(at.Unix()), of)
	}
	counts := map[[2]string]int{}
	for _, role := range []string{gossip.RoleController, gossip.RoleAgent} {
		counts[[2]string{role, "alive"}] = 0
	}
	for _, m := range k.directory.Members() {
		counts[[2]string{m.Role, strings.ToLower(m.State.String())}]++
	}
	for _, pool := range trust.GossipPools {
		gauge(descGossipKeys, float64(len(k.keys.secrets(pool))), pool)
	}
	for pool, refused := range map[string]map[string]uint64{"controllers": k.directory.controllers.Refused(), "nodes": k.directory.nodes.Refused()} {
		for reason, n := range refused {
			to <- metrics.NewLazyConstMetric(descGossipRefused, metrics.CounterValue, float64(n), pool, reason)
		}
	}
	for labels, n := range counts {
		gauge(descGossip, float64(n), labels[0], labels[1])
	}
}

// registerMetrics serves the controller's metrics beside the API's. There is one
// controller in a process.
func (k *controller) registerMetrics() {
	legacyregistry.CustomMustRegister(&collector{k: k})
}
