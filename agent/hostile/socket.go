package hostile

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// IsSocket says whether name is a Unix domain socket itself, no link to one.
func (r *Root) IsSocket(name string) (unix.Stat_t, bool, error) {
	st, err := r.Lstat(name)
	return st, err == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK, err
}

// DialUnix connects to the Unix domain socket called name. It is found without following
// a link and is connected to as that very one, whatever becomes of its name: who may write
// in the folder cannot lead the agent to another socket of the machine.
func (r *Root) DialUnix(ctx context.Context, name string) (net.Conn, error) {
	fd, err := r.openat2("connect to", name, unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW, Resolve: beneath &^ unix.RESOLVE_NO_XDEV})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), filepath.Join(r.path, name))
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, r.fail("connect to", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, r.fail("connect to", name, fmt.Errorf("%w: it is %s, no socket", ErrKind, KindName(st.Mode)))
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, r.fail("connect to", name, err)
	}
	return conn, nil
}
