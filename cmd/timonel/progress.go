package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// progress shows what `up` does: on a terminal one line that moves, elsewhere
// (CI, a pipe) plain lines.
type progress struct {
	out      io.Writer
	terminal bool

	mu   sync.Mutex
	stop func()
}

const clearLine = "\r\x1b[2K"

// Start shows that something begins.
func (p *progress) Start(what string) {
	p.end()
	if !p.terminal {
		fmt.Fprintf(p.out, "… %s\n", what)
		return
	}
	begin := time.Now()
	done, ended := make(chan struct{}), make(chan struct{})
	p.mu.Lock()
	p.stop = func() { close(done); <-ended }
	p.mu.Unlock()
	go func() {
		defer close(ended)
		frames := []rune("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
		ticker := time.NewTicker(100 * time.Millisecond)
		defer ticker.Stop()
		for i := 0; ; i++ {
			fmt.Fprintf(p.out, "%s%c %s (%.0f s)", clearLine, frames[i%len(frames)], what, time.Since(begin).Seconds())
			select {
			case <-done:
				fmt.Fprint(p.out, clearLine)
				return
			case <-ticker.C:
			}
		}
	}()
}

// Done shows that what has begun ended well.
func (p *progress) Done(format string, args ...any) {
	p.end()
	fmt.Fprintf(p.out, "✓ "+format+"\n", args...)
}

// end stops the moving line, if there is one.
func (p *progress) end() {
	p.mu.Lock()
	stop := p.stop
	p.stop = nil
	p.mu.Unlock()
	if stop != nil {
		stop()
	}
}
