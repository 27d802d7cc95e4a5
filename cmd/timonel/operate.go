package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/spf13/cobra"

	"timonel/internal/cluster"
	"timonel/internal/machines"
)

// onEach makes a command that does something to each machine named.
func (t *tool) onEach(use, short string, do func(ctx context.Context, s *cluster.Spec, name string) error) *cobra.Command {
	return &cobra.Command{
		Use: use + " NAME…", Short: short, Args: needNames,
		RunE: func(cmd *cobra.Command, names []string) error {
			s, err := t.load()
			if err != nil {
				return err
			}
			for _, name := range names { // all are right before one is touched
				if err := s.Check(name); err != nil {
					return err
				}
			}
			var failed []error
			for _, name := range names {
				failed = append(failed, do(cmd.Context(), s, name))
			}
			return errors.Join(failed...)
		},
	}
}

func needNames(cmd *cobra.Command, names []string) error {
	if len(names) == 0 {
		return fmt.Errorf("name a machine: %s c1, say", cmd.CommandPath())
	}
	return nil
}

func (t *tool) killCommand() *cobra.Command {
	var process bool
	cmd := t.onEach("kill", "Cut a machine's power, or kill -9 its controller or agent", func(ctx context.Context, s *cluster.Spec, name string) error {
		return s.Kill(ctx, name, process)
	})
	cmd.Long = `Cut a machine's power: its link goes down and every process in it, containerd and
containers included, is killed. Nobody is told. With --process, kill -9 hits the
controller or the agent alone; containers go on.`
	cmd.Flags().BoolVar(&process, "process", false, "kill the controller or agent process alone")
	return cmd
}

func (t *tool) startCommand() *cobra.Command {
	return t.onEach("start", "Turn a machine on and start its controller or agent", func(ctx context.Context, s *cluster.Spec, name string) error {
		return s.Start(ctx, name)
	})
}

func (t *tool) stopCommand() *cobra.Command {
	var timeout time.Duration
	cmd := t.onEach("stop", "End a controller or agent in order (SIGTERM)", func(ctx context.Context, s *cluster.Spec, name string) error {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		return s.Stop(ctx, name)
	})
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait for it")
	return cmd
}

func (t *tool) pauseCommand() *cobra.Command {
	var process bool
	cmd := t.onEach("pause", "Stop a machine where it stands (SIGSTOP)", func(ctx context.Context, s *cluster.Spec, name string) error {
		return s.Pause(ctx, name, process)
	})
	cmd.Flags().BoolVar(&process, "process", false, "pause the controller or agent process alone")
	return cmd
}

func (t *tool) resumeCommand() *cobra.Command {
	return t.onEach("resume", "Let a paused machine go on (SIGCONT)", func(ctx context.Context, s *cluster.Spec, name string) error {
		return s.Resume(ctx, name)
	})
}

func (t *tool) wipeCommand() *cobra.Command {
	return t.onEach("wipe", "Delete the data of a controller or agent that does not run", func(ctx context.Context, s *cluster.Spec, name string) error {
		return s.Wipe(ctx, name)
	})
}

func (t *tool) partitionCommand() *cobra.Command {
	var from []string
	var direction string
	var heal bool
	cmd := t.onEach("partition", "Cut a machine off from others, or heal all its cuts", func(_ context.Context, s *cluster.Spec, name string) error {
		if heal {
			return s.Heal(name)
		}
		switch machines.Direction(direction) {
		case machines.Both, machines.In, machines.Out:
			return s.Partition(name, from, machines.Direction(direction))
		}
		return fmt.Errorf("--direction %q: want both, in or out", direction)
	})
	cmd.Long = `Drop all packets between a machine and others: by default all of them and the
host. With --direction in, only what is sent to it; with out, only what it sends.
--heal ends all cuts of the machine.`
	cmd.Flags().StringSliceVar(&from, "from", nil, "cut off from these machines only; 'host' is this host and all behind it")
	cmd.Flags().StringVar(&direction, "direction", "both", "both, in or out")
	cmd.Flags().BoolVar(&heal, "heal", false, "end all cuts of the machine")
	return cmd
}

func (t *tool) logsCommand() *cobra.Command {
	var follow bool
	var tail int
	cmd := &cobra.Command{
		Use: "logs NAME", Short: "Print the log of a controller or agent", Args: needOne,
		RunE: func(cmd *cobra.Command, names []string) error {
			s, err := t.load()
			if err != nil {
				return err
			}
			if err := s.Check(names[0]); err != nil {
				return err
			}
			return printLog(cmd.Context(), cmd.OutOrStdout(), s.LogFile(names[0]), tail, follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on as it grows")
	cmd.Flags().IntVar(&tail, "tail", -1, "print the last lines only; -1: all")
	return cmd
}

func needOne(cmd *cobra.Command, names []string) error {
	if len(names) != 1 {
		return fmt.Errorf("name one machine: %s c1, say", cmd.CommandPath())
	}
	return nil
}

func printLog(ctx context.Context, out io.Writer, path string, tail int, follow bool) error {
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s is not there: it has not been started", path)
	} else if err != nil {
		return err
	}
	defer file.Close()
	if tail >= 0 {
		if err := seekTail(file, tail); err != nil {
			return err
		}
	}
	if _, err := io.Copy(out, file); err != nil || !follow {
		return err
	}
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if _, err := io.Copy(out, file); err != nil {
			return err
		}
	}
}

// seekTail moves to where the last lines begin.
func seekTail(file *os.File, lines int) error {
	var starts []int64
	offset := int64(0)
	reader := bufio.NewReader(file)
	for {
		line, err := reader.ReadString('\n')
		if line != "" {
			if starts = append(starts, offset); len(starts) > lines {
				starts = starts[1:]
			}
			offset += int64(len(line))
		}
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
	}
	to := offset
	if len(starts) > 0 {
		to = starts[0]
	}
	_, err := file.Seek(to, io.SeekStart)
	return err
}

func (t *tool) execCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "exec NAME -- COMMAND…", Short: "Run a command on a machine, as if logged in there", Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := t.load()
			if err != nil {
				return err
			}
			if err := s.Check(args[0]); err != nil {
				return err
			}
			inside, err := s.Machine(args[0]).Command(cmd.Context(), args[1:]...)
			if err != nil {
				return err
			}
			inside.Stdin, inside.Stdout, inside.Stderr = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
			err = inside.Run()
			if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
				os.Exit(exit.ExitCode())
			}
			return err
		},
	}
	return cmd
}
