// Package plugin finds the plugins of a node, as the kubelet's plugin watcher does: who
// puts a socket into the folder plugins_registry and serves
// pluginregistration.v1.Registration there is asked what it is and is told whether it was
// taken. What becomes of a plugin is a [Handler]'s matter, one a type: CSIPlugin,
// DRAPlugin.
//
//	w := plugin.New(plugin.Config{Dir: dir, Handlers: map[string]plugin.Handler{pluginregistration.CSIPlugin: csi}})
//	err := w.Run(ctx)
//
// A socket that goes takes its plugin with it; one that is made anew is another plugin,
// which is registered again. One that does not answer is asked again, after 500 ms at
// first and 2 min 2 s in the end. Sockets in folders below plugins_registry are not looked
// for: no registrar puts one there.
//
// Whoever may write in the folder is root on this node or was let in by one who is, and is
// still not believed: no link is followed, answers are bounded in bytes and in time, and a
// name that is taken stays with whom it was given to for as long as that one's socket is
// there.
package plugin
