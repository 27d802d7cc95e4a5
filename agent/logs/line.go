package logs

import (
	"bytes"
	"time"
)

// maxHead bounds what is before the text of an entry: time, stream and tags.
const maxHead = 256

// Streams of a container.
const (
	Stdout = "stdout"
	Stderr = "stderr"
)

// entry is one line of a log's file, without its text: "TIME STREAM TAGS ".
type entry struct {
	time    time.Time
	stream  string
	partial bool // the line that the container wrote goes on in the next entry
}

// parseHead reads what is before the text of an entry.
func parseHead(head []byte) (entry, bool) {
	at, rest, ok := bytes.Cut(head, []byte(" "))
	if !ok {
		return entry{}, false
	}
	stream, rest, ok := bytes.Cut(rest, []byte(" "))
	if !ok {
		return entry{}, false
	}
	tags, _, ok := bytes.Cut(rest, []byte(" "))
	if !ok {
		return entry{}, false
	}
	e := entry{}
	switch string(stream) {
	case Stdout:
		e.stream = Stdout
	case Stderr:
		e.stream = Stderr
	default:
		return entry{}, false
	}
	var err error
	if e.time, err = time.Parse(time.RFC3339Nano, string(at)); err != nil {
		return entry{}, false
	}
	tag, _, _ := bytes.Cut(tags, []byte(":")) // more may be added some day
	e.partial = string(tag) == "P"
	return e, true
}

// sink takes what a parser finds: for each entry a begin, its text in pieces of
// any size, and an end.
type sink interface {
	begin(entry) error
	text([]byte) error
	end() error
}

// parser cuts a log's file, given in pieces, into entries. It holds no more than
// what is before the text, however long a line is. What is no entry is passed
// over up to the end of its line.
type parser struct {
	state  parserState
	entry  entry
	head   []byte
	spaces int
	good   bool // there has been an entry
	bad    bool // there has been something else
}

type parserState int

const (
	inHead parserState = iota
	inText
	inJunk
)

// feed takes the next piece. After an error of the sink nothing more may be fed.
func (p *parser) feed(b []byte, s sink) error {
	for len(b) > 0 {
		var err error
		switch p.state {
		case inHead:
			b, err = p.feedHead(b, s)
		case inText:
			b, err = p.feedText(b, s)
		case inJunk:
			i := bytes.IndexByte(b, '\n')
			if i < 0 {
				return nil
			}
			b = b[i+1:]
			p.reset()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *parser) reset() { p.state, p.head, p.spaces = inHead, p.head[:0], 0 }

func (p *parser) feedHead(b []byte, s sink) ([]byte, error) {
	for i, c := range b {
		if c == '\n' {
			p.bad = true
			p.reset()
			return b[i+1:], nil
		}
		p.head = append(p.head, c)
		if c == ' ' {
			p.spaces++
		}
		if p.spaces < 3 && len(p.head) < maxHead {
			continue
		}
		e, ok := parseHead(p.head)
		if !ok {
			p.bad, p.state = true, inJunk
			return b[i+1:], nil
		}
		p.good, p.state, p.entry = true, inText, e
		return b[i+1:], s.begin(e)
	}
	return nil, nil
}

func (p *parser) feedText(b []byte, s sink) ([]byte, error) {
	i := bytes.IndexByte(b, '\n')
	if i < 0 {
		return nil, s.text(b)
	}
	text := b[:i+1]
	if p.entry.partial {
		text = b[:i]
	}
	p.reset()
	if len(text) > 0 {
		if err := s.text(text); err != nil {
			return nil, err
		}
	}
	return b[i+1:], s.end()
}

// close takes that no more of this file comes. A text without an end is shown as
// it is: the disk was full, or the machine went down.
func (p *parser) close(s sink) error {
	text := p.state == inText
	if p.state == inHead && len(p.head) > 0 {
		p.bad = true
	}
	p.reset()
	if text {
		return s.end()
	}
	return nil
}
