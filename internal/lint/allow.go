package main

// allowed are the uses in agent/ of files that no container, image, registry or
// peer writes, and of calls that are safe as they are used. Reading has no
// entry: hostile.ReadRegular reads the agent's and the kernel's files too.
var allowed = []allowance{
	{"agent/agent.go", "os.MkdirAll os.WriteFile", "the data folder itself, and controllers.json in it"},
	{"agent/cgroup/cgroup.go", "os.MkdirAll os.Mkdir os.ReadDir os.ReadFile os.Stat os.WriteFile filepath.WalkDir unix.Rmdir unix.Statfs",
		"the kernel's cgroup file system, which has no links and no files but its own"},
	{"agent/cleanup.go", "filepath.Glob", "the names of processes in /proc"},
	{"agent/cleanup.go", "os.Stat", "whether the agent's own folder of a pod is there"},
	{"agent/containerd/config.go", "os.MkdirAll os.WriteFile", "containerd's own folder; /proc/self/oom_score_adj"},
	{"agent/containerd/daemon.go", "os.OpenFile os.WriteFile", "containerd's log and pid file, in its own folder"},
	{"agent/containerd/import.go", "filepath.Glob", "the names in the administrator's folder of images"},
	{"agent/desired/store.go", "os.MkdirAll filepath.WalkDir", "the store's own folder, 0700; it follows no links"},
	{"agent/desired/writer.go", "os.MkdirAll os.Open os.OpenFile os.Remove os.RemoveAll os.Rename", "the store's own folder, 0700; folders are opened to be synced"},
	{"agent/podnet/guard.go", "os.Open io.ReadAll", "the agent's own guard.json, read through io.LimitReader"},
	{"agent/podnet/podnet.go", "os.MkdirAll os.WriteFile os.Stat", "the agent's own CNI configuration and state, /proc/sys, and the plugins that root installed"},
	{"agent/volume/subpath.go", "unix.Mount", "from a pinned descriptor to a folder that no container sees"},
	{"agent/volume/tmpfs.go", "unix.Mount", "on a folder whose parent no container sees"},
}
