// Package registry fetches from image registries, none of which is believed: a pod's
// owner names any host as one.
//
//	r := registry.New(registry.Config{HostsDir: dir, User: user, Secret: secret})
//	defer r.Close()
//	client.Pull(ctx, name, client.WithResolver(r), client.WithImageHandlerWrapper(registry.Check(store)))
//
// What it bounds:
//
//   - what is read whole: a manifest, an index and a configuration have [MaxDocument]
//     bytes, answers that are no content (tokens, errors, redirects) 1 MiB;
//   - what is streamed: a blob has the bytes that its manifest says, and a zstd frame in it
//     a window of [maxWindow];
//   - time: an answer that stands still for [Config.Stall], or comes at less than 1 KiB/s,
//     ends;
//   - places: names beside the registry's own, to which it redirects or where it says
//     that tokens are, are not on this machine, and nothing is asked of link-local addresses,
//     where clouds tell machines their secrets, but by the administrator's word. The URLs
//     of a layer in a manifest are not followed;
//   - credentials: they go to the registry, its mirrors, and where these say that tokens
//     are; not to hosts that they redirect to;
//   - what an image says of itself: layers, and the length of the user's name, which
//     containerd repeats in each list of images.
//
// Hosts are configured by HOST/hosts.toml, in containerd's format.
package registry
