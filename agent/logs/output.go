package logs

import (
	"bufio"
	"errors"
	"io"
	"time"
)

// Options are what is read of a log, as in a v1.PodLogOptions.
type Options struct {
	// Follow goes on with what is written until the container has ended.
	Follow bool
	// Timestamps puts the time before each line.
	Timestamps bool
	// TailLines is how many entries of the end are read; nil: all.
	TailLines *int64
	// LimitBytes is how many bytes are written at most; nil: any number.
	LimitBytes *int64
	// Since leaves out what was written before.
	Since time.Time
	// Stream is Stdout or Stderr; empty: both.
	Stream string
}

// timestamp has all nanoseconds always.
const timestamp = "2006-01-02T15:04:05.000000000Z07:00 "

// errEnough ends reading: as much was written as was asked for.
var errEnough = errors.New("enough")

// output writes the entries that were asked for.
type output struct {
	w       *bufio.Writer
	o       Options
	bytes   int64 // still wanted; negative: any number
	entries int64 // likewise
	shown   bool  // the present entry is
	inLine  bool  // what was written last is no whole line
	empty   bool  // the present entry has no text so far
	last    byte
	stamp   []byte
}

func newOutput(w io.Writer, o Options) *output {
	out := &output{w: bufio.NewWriterSize(w, 32<<10), o: o, bytes: -1, entries: -1}
	if o.LimitBytes != nil {
		out.bytes = max(*o.LimitBytes, 0)
	}
	if o.TailLines != nil && !o.Follow {
		out.entries = max(*o.TailLines, 0)
	}
	return out
}

// enough says whether nothing more is wanted.
func (o *output) enough() bool { return o.bytes == 0 || o.entries == 0 }

func (o *output) begin(e entry) error {
	if o.enough() {
		return errEnough
	}
	o.shown = !e.time.Before(o.o.Since) && (o.o.Stream == "" || o.o.Stream == e.stream)
	o.empty = true
	if !o.shown || !o.o.Timestamps || o.inLine {
		return nil
	}
	o.stamp = e.time.AppendFormat(o.stamp[:0], timestamp)
	return o.write(o.stamp)
}

func (o *output) text(b []byte) error {
	if !o.shown {
		return nil
	}
	o.empty, o.last = false, b[len(b)-1]
	return o.write(b)
}

func (o *output) write(b []byte) error {
	if o.bytes >= 0 {
		b = b[:min(int64(len(b)), o.bytes)]
		o.bytes -= int64(len(b))
	}
	if _, err := o.w.Write(b); err != nil {
		return err
	}
	if o.bytes == 0 {
		return errEnough
	}
	return nil
}

func (o *output) end() error {
	if o.entries > 0 {
		o.entries--
	}
	if o.shown {
		o.inLine = !o.empty && o.last != '\n'
	}
	if o.enough() {
		return errEnough
	}
	return nil
}

// note writes something that the container did not say, on a line of its own.
func (o *output) note(text string) error {
	if o.inLine {
		text = "\n" + text
	}
	o.inLine = false
	_, err := o.w.WriteString(text + "\n")
	return err
}
