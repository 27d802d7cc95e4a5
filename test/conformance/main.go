package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"timonel/internal/cluster"
)

type options struct {
	bin, out, name      string
	focus, skip, labels string
	list                string
	passing, registries string
	repeat, procs       int
	load, grow, keep    bool
	timeout             time.Duration
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "folder of Timonel's programs, the suite's in conformance below it")
	flag.StringVar(&o.out, "out", "run/conformance", "folder of the cluster and the reports")
	flag.StringVar(&o.name, "name", "conf", "name of the cluster")
	flag.StringVar(&o.focus, "focus", "", "run the tests alone whose names this regular expression matches")
	flag.StringVar(&o.skip, "skip", "", "do not run the tests whose names this regular expression matches")
	flag.StringVar(&o.list, "list", "", "run the tests alone that this file names, one a line; all of them have to pass")
	flag.StringVar(&o.labels, "labels", "Conformance", "ginkgo's label filter: which tests there are at all")
	flag.StringVar(&o.passing, "passing", "test/conformance/passing.txt", "list of the tests that must pass")
	flag.StringVar(&o.registries, "registries", "test/conformance/registries.yaml", "where the suite looks for its images")
	flag.IntVar(&o.repeat, "repeat", 1, "how often to run them all")
	flag.IntVar(&o.procs, "procs", 8, "how many tests run at once, but for [Serial] ones")
	flag.BoolVar(&o.load, "load", false, "keep the cluster and this machine busy meanwhile")
	flag.BoolVar(&o.grow, "grow", false, "add to the list what passed in every round")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster up")
	flag.DurationVar(&o.timeout, "timeout", 3*time.Hour, "how long one round may take")
	flag.Parse()
	if err := o.check(flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(2)
	}
	if err := run(ctx, o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

func (o *options) check(rest []string) error {
	switch {
	case len(rest) > 0:
		return fmt.Errorf("unknown arguments %q: tests are chosen by -focus and -skip", rest)
	case o.repeat < 1:
		return fmt.Errorf("-repeat %d: want at least 1", o.repeat)
	case o.procs < 1:
		return fmt.Errorf("-procs %d: want at least 1", o.procs)
	case o.list != "" && (o.focus != "" || o.skip != "" || o.grow):
		return errors.New("-list says which tests to run: it goes without -focus, -skip and -grow")
	}
	if o.list != "" {
		o.passing = o.list
	}
	for _, path := range []*string{&o.bin, &o.out, &o.passing, &o.registries} {
		abs, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = abs
	}
	return nil
}

func run(ctx context.Context, o options, w io.Writer) (err error) {
	must, err := readPassing(o.passing)
	if err != nil {
		return err
	}
	whole := o.focus == "" && o.skip == ""
	if o.list != "" {
		o.focus = exactly(must)
	}
	spec, err := up(ctx, o, w)
	if !o.keep {
		defer func() { err = errors.Join(err, down(o)) }()
	}
	if err != nil {
		return err
	}
	stop, err := serveImages(filepath.Join(o.images(), "suite.tar"), o.registry(), spec.Network().Host())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	if o.load {
		l, loadErr := startLoad(ctx, spec)
		if loadErr != nil {
			return loadErr
		}
		defer func() { fmt.Fprintln(w, l.stop()) }()
	}
	kubeconfig, err := o.kubeconfig(spec)
	if err != nil {
		return err
	}
	rounds, err := o.rounds(ctx, kubeconfig, w)
	t := tally(rounds)
	if len(rounds) > 0 {
		t.print(w) // whole rounds count, also when a later one could not be run
	}
	if err != nil {
		return err
	}
	v := t.judge(must, whole)
	v.print(w, o.grow)
	if o.grow {
		if err := writePassing(o.passing, append(must, v.fresh...)); err != nil {
			return err
		}
	}
	return v.err()
}

// up brings the cluster up, or what is missing of it.
func up(ctx context.Context, o options, w io.Writer) (*cluster.Spec, error) {
	dir := filepath.Join(o.out, "cluster")
	if err := os.MkdirAll(o.registry(), 0o755); err != nil { // what is in it may come later
		return nil, err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(o.bin, "timonel"), "up", "--run", dir, "--name", o.name,
		"--images", o.images(), "--sample=false", "--agent-flag=--registry-config="+o.registry())
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("bring the cluster up: %w", err)
	}
	return cluster.Load(dir)
}

// images is the folder of the archives that agents import.
func (o *options) images() string { return filepath.Join(o.bin, "conformance", "images") }

// registry is the folder of containerd's configuration of the registry that serves them.
func (o *options) registry() string { return filepath.Join(o.out, "registry") }

// kubeconfig writes the suite's: to one controller. The suite keeps a server's address
// alone of it and forgets the name that is to be in the certificate, and controllers'
// certificates have their own address, not the load balancer's.
func (o *options) kubeconfig(spec *cluster.Spec) (string, error) {
	config, err := clientcmd.LoadFromFile(spec.Kubeconfig())
	if err != nil {
		return "", err
	}
	config.CurrentContext = spec.ControllerNames()[0]
	path := filepath.Join(o.out, "kubeconfig")
	return path, clientcmd.WriteToFile(*config, path)
}

// down takes it down, also when this program was told to end.
func down(o options) error {
	out, err := exec.Command(filepath.Join(o.bin, "timonel"), "down", "--run", filepath.Join(o.out, "cluster"), "--name", o.name).CombinedOutput()
	if err != nil {
		return fmt.Errorf("take the cluster down: %w\n%s", err, out)
	}
	return nil
}
