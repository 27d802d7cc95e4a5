// Package gossip says who of the cluster is alive.
//
// Controllers and agents form one encrypted memberlist pool (SWIM: random
// probes, indirect probes, suspicion that the suspect may refute). Each member
// carries a few tags: what it is, and on which ports it serves.
//
//	pool, err := gossip.Open(gossip.Config{
//		Name: "c1", Role: gossip.RoleController, ClusterID: id, Key: key,
//		BindAddr: "10.0.0.1", Join: []string{"10.0.0.2:7946", "10.0.0.3:7946"},
//	})
//	defer pool.Close()
//	for event := range pool.Subscribe(ctx) { … }
//
// A member is Alive, Suspect, Dead or Left. Dead and Left are what the whole
// pool agreed on. memberlist keeps to itself whom it suspects, so Suspect is
// this member's own finding: two direct pings in a row that were not answered
// ([Config.Watch]). [Pool.Probe] asks the same of one member at once; that is
// what a verdict with two witnesses is made of.
//
// A pool heals by itself: it calls the seeds and whoever it knew and lost, again
// and again, so that the halves of a partition find each other. It takes in
// nobody of another cluster, and says so.
package gossip
