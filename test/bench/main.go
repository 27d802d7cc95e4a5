package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/tools/clientcmd"
)

func newDialer() *net.Dialer { return &net.Dialer{Timeout: 5 * time.Second} }

// rows are what is measured, in the order of the table; a row prints the figures
// that its names' prefix collects.
var rows = []struct{ name, title, wanted string }{
	{"create32", "create ConfigMap, 32 clients", "≥ 1700/s"},
	{"create1", "create ConfigMap, 1 client", "p50 ≤ 1.5 ms"},
	{"get32", "linearizable get, 32 clients", "≥ 4000/s"},
	{"list", fmt.Sprintf("list of %d objects, 4 clients", listed), ""},
	{"watch", fmt.Sprintf("events to %d watchers, 1 writer", watchers), ""},
	{"memory", "idle memory, whole control plane", "≤ 200 MB (110 anon.) a controller"},
	{"rest", "memory a minute after the rows above, whole control plane", "≤ 200 MB and twice the state a controller"},
	{"deployment", fmt.Sprintf("Deployment of %d pods on %d Nodes, created and bound", replicas, workloadNodes), "≤ 2.0 s (1.0 s, 1 controller)"},
	{"statefulset", fmt.Sprintf("StatefulSet of %d, parallel, the same", replicas), "≤ 2.0 s (1.0 s, 1 controller)"},
	{"job", fmt.Sprintf("Job of %d, the same", replicas), "≤ 2.0 s (1.0 s, 1 controller)"},
	{"jobs", fmt.Sprintf("%d Jobs of one pod, created to finished, agents simulated", jobs), "a tenth of Kubernetes' time"},
	{schedulingRow, "", ""}, // one for each of -shapes and -nodes
	{"kill", "leader killed: longest gap in writes", "≤ 1.0 s"},
}

type options struct {
	dir, bin        string
	before          string
	sides, rows     []string
	seconds, settle time.Duration
	rounds          int
	kubeconfig      string
	profiles        string
	scheduling      []schedulingShape
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	debug.SetGCPercent(400) // a heap of a few MB would be collected ten times a second
	var o options
	var names []string
	for _, r := range rows {
		if r.name != schedulingRow { // takes a minute for each shape, and is asked for
			names = append(names, r.name)
		}
	}
	sides := flag.String("sides", "kubernetes1,kubernetes3,timonel", "which to measure: kubernetes1, kubernetes3, timonel, timonel1, timonel-wal, and before: see -before")
	which := flag.String("rows", strings.Join(names, ","), "what to measure")
	shapeNames := flag.String("shapes", "all", "the shapes of row scheduling, upstream's scheduler_perf: "+shapeList())
	nodes := flag.String("nodes", "500", "the numbers of Nodes of row scheduling: 500 and 5000 are upstream's")
	seconds := flag.Float64("seconds", 10, "how long each row runs")
	settle := flag.Float64("settle", 30, "how long a side rests before its memory is read")
	flag.IntVar(&o.rounds, "rounds", 3, "how often each side is measured; the median is printed")
	flag.StringVar(&o.bin, "bin", "bin", "folder of the programs, Kubernetes' and etcd's in bench below it")
	flag.StringVar(&o.before, "before", "", "folder of another build's programs: three controllers of it are the side \"before\"")
	flag.StringVar(&o.dir, "dir", "", "folder on the disk to measure on (default: a temporary one)")
	flag.StringVar(&o.kubeconfig, "kubeconfig", "", "measure the API of this kubeconfig instead, one of its contexts being one server")
	flag.StringVar(&o.profiles, "profiles", "", "folder to put CPU profiles of the API servers during each row of calls into, and heap profiles at rest")
	flag.Parse()
	o.sides, o.rows = strings.Split(*sides, ","), strings.Split(*which, ",")
	o.seconds, o.settle = time.Duration(*seconds*float64(time.Second)), time.Duration(*settle*float64(time.Second))
	if err := o.expand(*shapeNames, *nodes); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// figures are the results of one side: by row, one of each round.
type figures map[string][]measure

// measure is one result: what it is judged by, and what is told beside it.
type measure struct {
	rate          float64
	p50, p99, gap time.Duration
	took          time.Duration // of a row that is done once
	// cpu is what all processes of the side used for one call, or for the whole of a row
	// that is done once, client what this program did. They hardly depend on what else
	// the machine does, as the others do.
	cpu, client time.Duration
	rss, anon   float64
}

func run(ctx context.Context, o options) error {
	for _, name := range o.rows {
		if !slices.ContainsFunc(rows, func(r struct{ name, title, wanted string }) bool { return r.name == name }) {
			return fmt.Errorf("-rows: no row %q", name)
		}
	}
	if o.kubeconfig != "" {
		return running(ctx, o)
	}
	for _, name := range o.sides {
		if starters[name] == nil {
			return fmt.Errorf("-sides: no side %q", name)
		}
	}
	if slices.Contains(o.sides, "before") && o.before == "" {
		return errors.New("-sides: before needs -before, a folder with another build's controller")
	}
	var err error
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	if o.before, err = filepath.Abs(o.before); err != nil {
		return err
	}
	parent, err := os.MkdirTemp(o.dir, "timonel-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(parent)
	results, titles := map[string]figures{}, map[string]string{}
	for round := range o.rounds {
		for _, name := range o.sides {
			dir := filepath.Join(parent, fmt.Sprintf("%s-%d", name, round))
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			began := time.Now()
			bin := o.bin
			if name == "before" {
				bin = o.before
			}
			s, err := starters[name](ctx, dir, bin)
			if err != nil {
				return err
			}
			titles[name] = s.name
			if results[name] == nil {
				results[name] = figures{}
			}
			err = s.ready(ctx)
			fmt.Fprintf(os.Stderr, "round %d: %s ready after %.1f s; load %s", round+1, s.name, time.Since(began).Seconds(), loadAverage())
			if err == nil {
				err = s.measure(ctx, o, results[name])
			}
			s.stop()
			os.RemoveAll(dir)
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	print(o, results, titles)
	return nil
}

// running measures an API that somebody else runs.
func running(ctx context.Context, o options) error {
	config, err := clientcmd.LoadFromFile(o.kubeconfig)
	if err != nil {
		return err
	}
	s := &side{name: "as configured"}
	api, err := clientcmd.NewDefaultClientConfig(*config, nil).ClientConfig()
	if err != nil {
		return err
	}
	api.QPS = -1
	api.ContentType, api.AcceptContentTypes = "application/vnd.kubernetes.protobuf", "application/vnd.kubernetes.protobuf"
	s.apis = append(s.apis, api)
	results := figures{}
	for range o.rounds {
		if err := s.measure(ctx, o, results); err != nil {
			return err
		}
	}
	o.sides = []string{"api"}
	print(o, map[string]figures{"api": results}, map[string]string{"api": s.name})
	return nil
}

// measure runs the rows against a side and adds what they gave.
func (s *side) measure(ctx context.Context, o options, out figures) error {
	add := func(row string, m measure) {
		out[row] = append(out[row], m)
		fmt.Fprintf(os.Stderr, "  %-9s %s\n", row, m.text(row))
	}
	wants := func(row string) bool { return slices.Contains(o.rows, row) }
	atRest := func(row string, after time.Duration) error {
		if !wants(row) || len(s.processes) == 0 {
			return nil
		}
		if err := sleep(ctx, after); err != nil {
			return err
		}
		m, err := s.memory()
		if err != nil {
			return err
		}
		add(row, m)
		s.profile(ctx, o.profiles, row, "heap")()
		return nil
	}
	if err := atRest("memory", o.settle); err != nil {
		return err
	}
	l, err := newLoad(ctx, s.apis, 32)
	if err != nil {
		return err
	}
	// One of each call first: connections, caches and the object that get reads.
	if _, err := l.repeat(ctx, 32, time.Second, l.create); err != nil {
		return err
	}
	for _, row := range []struct {
		name    string
		clients int
		call    func(context.Context, int) error
	}{{"create32", 32, l.create}, {"create1", 1, l.create}, {"get32", 32, l.get}, {"list", 4, l.list}} {
		if !wants(row.name) {
			continue
		}
		if row.name == "list" {
			if err := l.fill(ctx); err != nil {
				return err
			}
		}
		profiled := s.profile(ctx, o.profiles, row.name, fmt.Sprintf("profile?seconds=%d", max(1, int(o.seconds.Seconds())-1)))
		before, own := s.cpu(), ownCPU()
		var t timing
		if row.clients == 1 {
			t, err = l.inTurn(ctx, len(s.apis), o.seconds, row.call)
		} else {
			t, err = l.repeat(ctx, row.clients, o.seconds, row.call)
		}
		cpu, client := s.cpu()-before, ownCPU()-own
		profiled()
		if err != nil {
			return fmt.Errorf("%s: %w", row.name, err)
		}
		add(row.name, measure{rate: t.rate, p50: t.p50, p99: t.p99, cpu: cpu / time.Duration(t.calls), client: client / time.Duration(t.calls)})
	}
	if wants("watch") {
		t, err := l.fanOut(ctx, o.seconds)
		if err != nil {
			return fmt.Errorf("watch: %w", err)
		}
		add("watch", measure{rate: t.rate, p50: t.p50, p99: t.p99})
	}
	if err := atRest("rest", time.Minute); err != nil {
		return err
	}
	for _, row := range workloadRows {
		if !wants(row.name) {
			continue
		}
		profiled := s.profile(ctx, o.profiles, row.name, "profile?seconds=6")
		before, own := s.cpu(), ownCPU()
		took, err := row.run(l, ctx)
		cpu, client := s.cpu()-before, ownCPU()-own
		profiled()
		if err != nil {
			return fmt.Errorf("%s: %w", row.name, err)
		}
		add(row.name, measure{took: took, cpu: cpu, client: client})
	}
	for _, row := range o.scheduling {
		var profiled func()
		var before, own, cpu, client time.Duration
		m, err := l.schedule(ctx, row.shape, row.nodes, func() {
			profiled = s.profile(ctx, o.profiles, row.row, "profile?seconds=5")
			before, own = s.cpu(), ownCPU()
		}, func() { cpu, client = s.cpu()-before, ownCPU()-own })
		if profiled != nil {
			profiled()
		}
		if err != nil {
			return fmt.Errorf("%s: %w", row.row, err)
		}
		m.cpu, m.client = cpu, client
		add(row.row, m)
	}
	if wants("kill") && s.leader != nil {
		gap, err := l.gap(ctx, max(8*time.Second, o.seconds), func() error {
			leader, err := s.leader(ctx)
			if err != nil || leader == nil {
				return errors.Join(errors.New("nobody leads"), err)
			}
			leader.kill()
			return nil
		})
		if err != nil {
			return fmt.Errorf("kill: %w", err)
		}
		add("kill", measure{gap: gap})
	}
	return nil
}

// memory is what all processes of the side hold.
func (s *side) memory() (m measure, err error) {
	for _, p := range s.processes {
		rss, anon, err := p.memory()
		if err != nil {
			return m, err
		}
		fmt.Fprintf(os.Stderr, "    %-24s %4.0f MB, %4.0f MB anonymous\n", p.name, rss, anon)
		m.rss, m.anon = m.rss+rss, m.anon+anon
	}
	return m, nil
}

func (m measure) text(row string) string {
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	if strings.HasPrefix(row, schedulingRow) {
		return fmt.Sprintf("%.0f pods/s, %.1f s, CPU %.1f + %.1f s", m.rate, m.took.Seconds(), m.cpu.Seconds(), m.client.Seconds())
	}
	switch row {
	case "memory", "rest":
		return fmt.Sprintf("%.0f MB (%.0f anon.)", m.rss, m.anon)
	case "kill":
		return fmt.Sprintf("%.2f s", m.gap.Seconds())
	case "deployment", "statefulset", "job", "jobs":
		return fmt.Sprintf("%.2f s, CPU %.2f + %.2f s", m.took.Seconds(), m.cpu.Seconds(), m.client.Seconds())
	case "create1":
		return fmt.Sprintf("p50 %.2f, p99 %.1f ms, %.0f/s, CPU %.2f + %.2f ms", ms(m.p50), ms(m.p99), m.rate, ms(m.cpu), ms(m.client))
	case "watch":
		return fmt.Sprintf("%.0f/s, p50 %.1f, p99 %.1f ms", m.rate, ms(m.p50), ms(m.p99))
	}
	return fmt.Sprintf("%.0f/s, p50 %.1f, p99 %.1f ms, CPU %.2f + %.2f ms", m.rate, ms(m.p50), ms(m.p99), ms(m.cpu), ms(m.client))
}

// median takes each figure's own.
func median(all []measure) measure {
	of := func(get func(measure) float64) float64 {
		var v []float64
		for _, m := range all {
			v = append(v, get(m))
		}
		slices.Sort(v)
		return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
	}
	return measure{
		rate: of(func(m measure) float64 { return m.rate }), rss: of(func(m measure) float64 { return m.rss }), anon: of(func(m measure) float64 { return m.anon }),
		p50: time.Duration(of(func(m measure) float64 { return float64(m.p50) })), p99: time.Duration(of(func(m measure) float64 { return float64(m.p99) })),
		gap: time.Duration(of(func(m measure) float64 { return float64(m.gap) })), cpu: time.Duration(of(func(m measure) float64 { return float64(m.cpu) })),
		client: time.Duration(of(func(m measure) float64 { return float64(m.client) })),
		took:   time.Duration(of(func(m measure) float64 { return float64(m.took) })),
	}
}

func print(o options, results map[string]figures, titles map[string]string) {
	fmt.Printf("Medians of %d rounds of %s a row. CPU is what all processes of the side, and the client, used for one call.\n\n| work |", o.rounds, o.seconds)
	for _, s := range o.sides {
		fmt.Printf(" %s |", titles[s])
	}
	fmt.Printf(" wanted, 3 controllers |\n|---|%s---|\n", strings.Repeat("---|", len(o.sides)))
	for _, r := range rows {
		if !slices.Contains(o.rows, r.name) {
			continue
		}
		fmt.Printf("| %s |", r.title)
		for _, s := range o.sides {
			if all := results[s][r.name]; len(all) > 0 {
				fmt.Printf(" %s |", median(all).text(r.name))
			} else {
				fmt.Print(" – |")
			}
		}
		fmt.Printf(" %s |\n", r.wanted+ratio(r.name, results))
	}
}

// ratio is how many times Kubernetes' rate Timonel's is, of a row of scheduling.
func ratio(row string, results map[string]figures) string {
	ours, theirs := results["timonel"][row], results["kubernetes1"][row]
	if !strings.HasPrefix(row, schedulingRow) || len(ours) == 0 || len(theirs) == 0 {
		return ""
	}
	ours, theirs = []measure{median(ours)}, []measure{median(theirs)}
	return fmt.Sprintf(": %.1f × in pods/s, %.1f × in CPU", ours[0].rate/theirs[0].rate, theirs[0].cpu.Seconds()/ours[0].cpu.Seconds())
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// loadAverage is how busy the machine is, as others on it falsify what is measured.
func loadAverage() string {
	content, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown\n"
	}
	return string(content)
}
