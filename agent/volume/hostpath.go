package volume

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"timonel/agent/hostile"
)

// hostPath checks or makes what the volume's type asks for.
func hostPath(s *corev1.HostPathVolumeSource) error {
	kind := corev1.HostPathUnset
	if s.Type != nil {
		kind = *s.Type
	}
	st, err := hostile.Stat(s.Path)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return err
	}
	is := func(want string, ok bool) error {
		if missing {
			return fmt.Errorf("hostPath type check failed: %s does not exist", s.Path)
		}
		if !ok {
			return fmt.Errorf("hostPath type check failed: %s is not a %s", s.Path, want)
		}
		return nil
	}
	switch kind {
	case corev1.HostPathUnset:
		return nil // the runtime makes a missing folder, as upstream's does
	case corev1.HostPathDirectoryOrCreate:
		if missing {
			return hostile.MakeFolder(s.Path, 0o755)
		}
		return is("directory", st.Mode&unix.S_IFMT == unix.S_IFDIR)
	case corev1.HostPathFileOrCreate:
		if missing {
			return hostile.CreateFile(s.Path, 0o644)
		}
		return is("file", st.Mode&unix.S_IFMT == unix.S_IFREG)
	case corev1.HostPathDirectory:
		return is("directory", !missing && st.Mode&unix.S_IFMT == unix.S_IFDIR)
	case corev1.HostPathFile:
		return is("file", !missing && st.Mode&unix.S_IFMT == unix.S_IFREG)
	case corev1.HostPathSocket:
		return is("socket", !missing && st.Mode&unix.S_IFMT == unix.S_IFSOCK)
	case corev1.HostPathCharDev:
		return is("character device", !missing && st.Mode&unix.S_IFMT == unix.S_IFCHR)
	case corev1.HostPathBlockDev:
		return is("block device", !missing && st.Mode&unix.S_IFMT == unix.S_IFBLK)
	}
	return fmt.Errorf("hostPath type %q is %w", kind, ErrUnsupported)
}
