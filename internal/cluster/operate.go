package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"timonel/internal/machines"
)

// Kill cuts a machine's power: the controller or agent and, on an agent's
// machine, containerd and every container are gone without a packet. With
// processOnly, kill -9 hits the controller or agent alone.
func (s *Spec) Kill(ctx context.Context, name string, processOnly bool) error {
	if err := s.Check(name); err != nil {
		return err
	}
	if processOnly {
		return s.Machine(name).Signal(ctx, unix.SIGKILL, false)
	}
	if err := s.Machine(name).PowerOff(ctx); err != nil {
		return err
	}
	return machines.RemoveCgroups(s.CgroupRoot(name))
}

// Stop asks a controller or agent to end in order, and waits until it has.
func (s *Spec) Stop(ctx context.Context, name string) error {
	if err := s.Check(name); err != nil {
		return err
	}
	return s.Machine(name).Stop(ctx)
}

// Start turns a machine on, if it is off, and starts its controller or agent.
// It does not wait until that serves.
func (s *Spec) Start(ctx context.Context, name string) error {
	if err := s.Check(name); err != nil {
		return err
	}
	if RoleOf(name) == Agent {
		if err := s.admit(ctx, name); err != nil {
			return err
		}
	}
	if err := s.Machine(name).Boot(ctx, s.program("machine")); err != nil {
		return err
	}
	return s.Machine(name).Start(ctx, s.process(name))
}

// Pause stops every process of a machine where it stands, or the controller or
// agent alone; Resume lets them go on.
func (s *Spec) Pause(ctx context.Context, name string, processOnly bool) error {
	if err := s.Check(name); err != nil {
		return err
	}
	return s.Machine(name).Signal(ctx, unix.SIGSTOP, !processOnly)
}

// Resume undoes Pause.
func (s *Spec) Resume(ctx context.Context, name string) error {
	if err := s.Check(name); err != nil {
		return err
	}
	return s.Machine(name).Signal(ctx, unix.SIGCONT, true)
}

// Partition cuts a machine off from others, by default from all and from the
// host.
func (s *Spec) Partition(name string, from []string, direction machines.Direction) error {
	if err := s.Check(name); err != nil {
		return err
	}
	if len(from) == 0 {
		from = append(s.Names(), machines.HostName)
	}
	for _, other := range from {
		if other != machines.HostName && !slices.Contains(s.Names(), other) {
			return fmt.Errorf("--from %s: %w, and %s", other, s.Check(other), machines.HostName)
		}
	}
	return s.Network().Cut(name, from, direction)
}

// Heal ends all cuts of a machine.
func (s *Spec) Heal(name string) error {
	if err := s.Check(name); err != nil {
		return err
	}
	return s.Network().Heal(name)
}

// Wipe deletes the data of a controller or agent that does not run, as if its
// disk had been replaced.
func (s *Spec) Wipe(ctx context.Context, name string) error {
	if err := s.Check(name); err != nil {
		return err
	}
	state, err := s.Machine(name).State(ctx)
	if err != nil {
		return err
	}
	if state.Up() {
		return fmt.Errorf("%s runs: `timonel kill %s` first", name, name)
	}
	if RoleOf(name) == Agent && state.On {
		return fmt.Errorf("containers of %s may run still: `timonel kill %s` first", name, name)
	}
	if err := os.RemoveAll(s.DataDir(name)); err != nil {
		return fmt.Errorf("wipe %s: %w", filepath.Base(name), err)
	}
	return nil
}
