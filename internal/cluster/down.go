package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"timonel/internal/machines"
)

// Down takes a cluster down and deletes its data, whatever state it is in. It
// goes on when something fails, and returns an error that lists what is left.
// It reports false when there was nothing to take down.
func Down(ctx context.Context, run, name string) (bool, error) {
	if os.Geteuid() != 0 {
		return false, errors.New("taking machines down takes root: run it with sudo")
	}
	os.Setenv("PATH", searchPath())
	s, err := Load(run)
	if errors.Is(err, ErrNone) || s == nil {
		// What is not written down is found by its names.
		if err := machines.CheckName(name); err != nil {
			return false, err
		}
		if run, err = filepath.Abs(run); err != nil {
			return false, err
		}
		s = &Spec{Name: name, Run: run, Forwarding: true}
	}
	names, err := s.found()
	if err != nil {
		return false, err
	}
	for _, machine := range names {
		if dir, ok := s.Machine(machine).RunsElsewhere(); ok {
			return false, fmt.Errorf("the machines of the cluster %s were made with another run folder: use --run %s", s.Name, filepath.Dir(dir))
		}
	}
	if len(names) == 0 && len(s.Network().Leftovers(nil)) == 0 && len(s.files(names)) == 0 {
		return false, nil
	}
	if _, err := os.Stat(s.Run); err == nil {
		unlock, err := lock(s.Run)
		if err != nil {
			return true, err
		}
		defer unlock()
	}
	var failed []error
	try := func(err error) {
		if err != nil {
			failed = append(failed, err)
		}
	}
	if s.Proxy.Alive() {
		try(unix.Kill(s.Proxy.Pid, unix.SIGKILL))
	}
	var group errgroup.Group
	for _, machine := range names {
		group.Go(func() error {
			err := s.Machine(machine).PowerOff(ctx)
			return errors.Join(err, machines.RemoveCgroups(s.CgroupRoot(machine)))
		})
	}
	try(group.Wait())
	try(s.Network().Delete())
	if !s.Forwarding && !othersUp() {
		_, err := machines.SetForwarding(false)
		try(err)
	}
	try(s.deleteFiles(names))
	left, err := s.leftovers(names)
	try(err)
	if len(left) > 0 {
		try(fmt.Errorf("still here: %s", strings.Join(left, ", ")))
	}
	return true, errors.Join(failed...)
}

// found lists the machines that the cluster has or that are there by their
// names.
func (s *Spec) found() ([]string, error) {
	names := s.Names()
	for _, pattern := range []string{filepath.Join("/run/netns", s.Name+"-*"), filepath.Join(s.Run, "*")} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			name := filepath.Base(path)
			if filepath.Dir(path) == "/run/netns" {
				name = strings.TrimPrefix(name, s.Name+"-")
			}
			if machineName.MatchString(name) && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names, nil
}

// files lists what of a cluster is in its run folder.
func (s *Spec) files(names []string) []string {
	var found []string
	for _, name := range append([]string{"bundle", "kubeconfig", "proxy.log", specFile, specFile + ".new"}, names...) {
		path := filepath.Join(s.Run, name)
		if _, err := os.Lstat(path); err == nil {
			found = append(found, path)
		}
	}
	return found
}

// deleteFiles deletes the cluster's files, but nothing that is mounted there.
func (s *Spec) deleteFiles(names []string) error {
	mounts, err := machines.MountsBelow(s.Run)
	if err != nil {
		return err
	}
	for _, mount := range slices.Backward(mounts) {
		if mount == s.Run {
			continue // the folder may be a file system of its own
		}
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s, and so delete nothing in %s: %w", mount, s.Run, err)
		}
	}
	var failed []error
	for _, path := range s.files(names) {
		if err := os.RemoveAll(path); err != nil {
			failed = append(failed, fmt.Errorf("delete %s: %w", path, err))
		}
	}
	if err := os.Remove(filepath.Join(s.Run, ".lock")); err != nil && !errors.Is(err, os.ErrNotExist) {
		failed = append(failed, err)
	}
	os.Remove(s.Run) // when nothing else is in it
	return errors.Join(failed...)
}

// leftovers lists what of the cluster is still on the host.
func (s *Spec) leftovers(names []string) ([]string, error) {
	left := s.Network().Leftovers(names)
	if s.Proxy.Alive() {
		left = append(left, fmt.Sprintf("process %d", s.Proxy.Pid))
	}
	mounts, err := machines.MountsBelow(s.Run)
	if err != nil {
		return nil, err
	}
	for _, mount := range mounts {
		if mount != s.Run {
			left = append(left, "mount "+mount)
		}
	}
	for _, name := range names {
		for _, dir := range machines.Cgroups(s.CgroupRoot(name)) {
			left = append(left, "cgroup "+dir)
		}
	}
	pids, err := machines.ProcessesNaming(s.Run + string(filepath.Separator))
	for _, pid := range pids {
		left = append(left, fmt.Sprintf("process %d", pid))
	}
	return left, err
}

// othersUp reports whether machines of another cluster need the host's
// forwarding still.
func othersUp() bool {
	links, err := machines.Bridges()
	return err != nil || len(links) > 0
}
