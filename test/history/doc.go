// Package history records what clients of a cluster did and saw while it was
// being broken, and checks that it could have happened on one correct copy of the
// state: linearizability of each key by porcupine, and what ties keys together by
// revisions: their order, lists, and watches.
//
//	var r history.Recorder
//	op := r.Begin(client, history.Operation{Kind: history.Update, Key: "a", Value: "7", If: 41})
//	… the request …
//	r.End(op, history.Outcome{Status: history.OK, Revision: 43})
//	report := history.Check(r.History(), time.Minute)
//
// Values must be unique, so that a value tells which write it is from.
package history
