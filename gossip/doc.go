// Package gossip says who of the cluster is alive.
//
// A pool is memberlist's (SWIM: random probes, indirect probes, suspicion that the
// suspect may refute), encrypted with keys that may be changed while it works. Each
// member carries a few tags: what it is, and on which ports it serves. There is one of
// the controllers and one of them and the agents, with keys of their own.
//
// Whoever has a key may say anything. So [Config.Admit] says who may be in the pool,
// what comes is bounded and looked through before it is decoded, and a member that
// watches publishes of another's life and death only what it saw itself.
//
//	pool, err := gossip.Open(gossip.Config{
//		Name: "c1", Role: gossip.RoleController, ClusterID: id, Keys: [][]byte{key},
//		BindAddr: "10.0.0.1", Join: []string{"10.0.0.2:7946", "10.0.0.3:7946"},
//	})
//	defer pool.Close()
//	for event := range pool.Subscribe(ctx) { … }
//
// A member is Alive, Suspect, Dead or Left. Dead and Left are what the whole pool agreed
// on, and what a member that watches found to be so. memberlist keeps to itself whom it
// suspects, so Suspect is
// this member's own finding: two direct pings in a row that were not answered
// ([Config.Watch]). [Pool.Probe] asks the same of one member at once; that is
// what a verdict with two witnesses is made of.
//
// A pool heals by itself: it calls the seeds and whoever it knew and lost, again
// and again, so that the halves of a partition find each other. It takes in
// nobody of another cluster, and says so.
package gossip
