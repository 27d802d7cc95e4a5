package node

import "timonel/agent/hostile"

// FileSystem is how much room a file system has.
type FileSystem struct {
	Device              uint64
	Capacity, Available int64 // bytes
	Inodes, InodesFree  int64 // 0 of 0: it has as many as it needs
}

// FileSystemOf looks at the file system that a folder is on. The path is the
// agent's own or the runtime's.
func FileSystemOf(path string) (FileSystem, error) {
	dir, err := hostile.OpenRoot(path)
	if err != nil {
		return FileSystem{}, err
	}
	defer dir.Close()
	st, err := dir.Lstat(".")
	if err != nil {
		return FileSystem{}, err
	}
	s, err := dir.Statfs()
	if err != nil {
		return FileSystem{}, err
	}
	return FileSystem{
		Device: st.Dev, Capacity: int64(s.Blocks) * s.Bsize, Available: int64(s.Bavail) * s.Bsize,
		Inodes: int64(s.Files), InodesFree: int64(s.Ffree),
	}, nil
}
