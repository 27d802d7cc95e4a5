package logs

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// notifier says when something is next written to a file, by one inotify
// instance for all: a user has 128 of them on a machine. Each watch is for one
// event, so that a container that writes fast costs no more than a slow one.
type notifier struct {
	f  *os.File
	fd int // f's; f.Fd() would make reading block beyond close

	mu      sync.Mutex
	closed  bool
	waiting map[int32][]chan<- struct{} // by watch
}

func newNotifier() (*notifier, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch logs: %w (see sysctl fs.inotify.max_user_instances)", err)
	}
	return &notifier{f: os.NewFile(uintptr(fd), "inotify"), fd: fd, waiting: map[int32][]chan<- struct{}{}}, nil
}

// arm has wake told, once, of the next change to a file, its name or its end.
// What happened before is for the caller to look at after arming. An error
// means that nothing will be told.
func (n *notifier) arm(f *os.File, wake chan<- struct{}) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return os.ErrClosed
	}
	const events = unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_MOVE_SELF | unix.IN_DELETE_SELF | unix.IN_ONESHOT
	wd, err := unix.InotifyAddWatch(n.fd, "/proc/self/fd/"+strconv.Itoa(int(f.Fd())), events)
	if err != nil {
		return fmt.Errorf("watch %s: %w (see sysctl fs.inotify.max_user_watches)", f.Name(), err)
	}
	for _, have := range n.waiting[int32(wd)] {
		if have == wake {
			return nil
		}
	}
	n.waiting[int32(wd)] = append(n.waiting[int32(wd)], wake)
	return nil
}

// forget ends what arm began for wake: nothing is kept for who went away.
func (n *notifier) forget(wake chan<- struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return
	}
	for wd, list := range n.waiting {
		rest := list[:0]
		for _, have := range list {
			if have != wake {
				rest = append(rest, have)
			}
		}
		if len(rest) > 0 {
			n.waiting[wd] = rest
			continue
		}
		delete(n.waiting, wd)
		_, _ = unix.InotifyRmWatch(n.fd, uint32(wd)) // it may have fired
	}
}

// run hands out what the kernel says until close.
func (n *notifier) run() error {
	buf := make([]byte, 64<<10)
	for {
		got, err := n.f.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch logs: %w", err)
		}
		n.mu.Lock()
		for at := 0; at+unix.SizeofInotifyEvent <= got; {
			e := (*unix.InotifyEvent)(unsafe.Pointer(&buf[at])) // as the kernel lays it out
			at += unix.SizeofInotifyEvent + int(e.Len)
			if e.Mask&unix.IN_Q_OVERFLOW != 0 {
				for wd := range n.waiting {
					n.tell(wd)
				}
				continue
			}
			n.tell(e.Wd)
		}
		n.mu.Unlock()
	}
}

// tell wakes who waits for a watch, which is gone. n.mu is held.
func (n *notifier) tell(wd int32) {
	for _, wake := range n.waiting[wd] {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
	delete(n.waiting, wd)
}

func (n *notifier) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	n.f.Close()
}
