// Package feed is what the controllers say of the cluster's network, on one node:
// Services and their EndpointSlices, and the policies that hold for the node's pods, for
// whoever makes rules or answers of them.
//
//	store := feed.NewStore("a1")
//	for after := uint64(0); ; {
//		changes, err := store.Changes(ctx, after)
//		if err != nil {
//			return err
//		}
//		after = changes.View.Revision()
//		… changes.Services, or all when changes.Reset …
//	}
//
// A [View] is immutable and shares with the one before all that did not change, so
// that a change among 10,000 Services costs the change. What it has of policies is whole:
// a pod is there with its policies, and a policy with the groups of addresses that it
// names, as the controllers had them at one revision of the state.
package feed
