package feed

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"timonel/internal/durable"
	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

// The file: magic, then a record of the cluster's id and one of the zone, then of each
// item its kind and a record, then a zero and the SHA-256 of all before. A record is its
// length and its bytes; numbers are varints. The kind told is no item's: its record is
// the revision that policies were told up to, a varint.
const (
	magic = "timonel network 1\n"
	told  = 1 << 20
	// maxFile bounds what is read.
	maxFile = 4 * wire.MaxBytes
	// writeAfter is how long changes are gathered before they are written, unless the
	// last time took long: then writing takes no more than a fiftieth of the time.
	writeAfter = time.Second
	writeShare = 50
)

// Keep writes what is known to the disk, some time after it changed and at the end,
// until ctx ends.
func (c *Client) Keep(ctx context.Context) error {
	if c.cfg.Path == "" {
		<-ctx.Done()
		return nil
	}
	var after uint64
	wait := writeAfter
	if v := c.cfg.Store.View(); v.Synced() {
		after = v.Revision() // load has read it
	}
	failed := false
	for {
		if _, err := c.cfg.Store.Changes(ctx, after); err != nil {
			return nil // ctx
		}
		ended := false
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			ended = true
		case <-timer.C:
		}
		v := c.cfg.Store.View()
		after = v.Revision()
		if v.Synced() {
			began := time.Now()
			if err := write(c.cfg.Path, v); err != nil && !failed {
				c.log.Error("what is known of Services cannot be kept on the disk; after a restart it comes from a controller", "error", err)
				failed = true
			} else if err == nil {
				failed = false
			}
			wait = max(writeAfter, writeShare*time.Since(began))
		}
		if ended {
			return nil
		}
	}
}

// write makes the file of a view.
func write(path string, v *View) error {
	temp := path + ".tmp"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	buffer := bufio.NewWriterSize(f, 256<<10)
	err = encode(buffer, v)
	if err == nil {
		err = buffer.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return durable.Rename(temp, path)
}

func encode(to io.Writer, v *View) error {
	sum := sha256.New()
	w := io.MultiWriter(to, sum)
	var scratch []byte
	record := func(kind pb.NetworkKind, raw []byte, err error) error {
		if err != nil {
			return err
		}
		scratch = scratch[:0]
		if kind != 0 {
			scratch = binary.AppendUvarint(scratch, uint64(kind))
		}
		scratch = binary.AppendUvarint(scratch, uint64(len(raw)))
		if _, err := w.Write(scratch); err != nil {
			return err
		}
		_, err = w.Write(raw)
		return err
	}
	if _, err := io.WriteString(w, magic); err != nil {
		return err
	}
	if err := errors.Join(record(0, []byte(v.epoch), nil), record(0, []byte(v.zone), nil)); err != nil {
		return err
	}
	for kind, marshal := range v.items {
		raw, err := marshal()
		if err := record(kind, raw, err); err != nil {
			return err
		}
	}
	if _, err := w.Write([]byte{0}); err != nil {
		return err
	}
	_, err := to.Write(sum.Sum(nil))
	return err
}

// items yields all that is kept.
func (v *View) items(yield func(kind pb.NetworkKind, marshal func() ([]byte, error)) bool) {
	message := func(kind pb.NetworkKind, m proto.Message) bool {
		return yield(kind, func() ([]byte, error) { return proto.MarshalOptions{Deterministic: true}.Marshal(m) })
	}
	more := true
	v.nodes.Scan(func(_ string, n *pb.NodeRoute) bool { more = message(pb.NetworkKind_NETWORK_KIND_NODE, n); return more })
	if more {
		v.services.Scan(func(_ string, s *corev1.Service) bool {
			more = yield(pb.NetworkKind_NETWORK_KIND_SERVICE, s.Marshal)
			return more
		})
	}
	if more {
		v.slices.Scan(func(_ string, s *discoveryv1.EndpointSlice) bool {
			more = yield(pb.NetworkKind_NETWORK_KIND_SLICE, s.Marshal)
			return more
		})
	}
	if more {
		v.policies.Scan(func(_ string, p *pb.NetworkPolicyItem) bool {
			more = message(pb.NetworkKind_NETWORK_KIND_POLICY, p)
			return more
		})
	}
	if more {
		v.groups.Scan(func(_ string, g *pb.NetworkGroup) bool {
			more = message(pb.NetworkKind_NETWORK_KIND_GROUP, g)
			return more
		})
	}
	if more {
		v.pods.Scan(func(_ string, p *pb.NetworkPod) bool { more = message(pb.NetworkKind_NETWORK_KIND_POD, p); return more })
	}
	if more {
		v.addresses.Scan(func(_ string, a *pb.AddressHolder) bool {
			more = message(pb.NetworkKind_NETWORK_KIND_ADDRESS, a)
			return more
		})
	}
	if more && v.told != 0 {
		yield(told, func() ([]byte, error) { return binary.AppendUvarint(nil, uint64(v.told)), nil })
	}
}

// load fills the store with what the file has.
func (c *Client) load() {
	err := c.read()
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return
	}
	c.log.Warn("what was kept of Services cannot be read; it comes anew from a controller", "file", c.cfg.Path, "error", err)
	c.items, c.bytes, c.digest = make(map[wire.Key]held), 0, wire.Digest{}
}

func (c *Client) read() error {
	f, err := os.Open(c.cfg.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	length := info.Size() - sha256.Size
	if !info.Mode().IsRegular() || length < int64(len(magic)) || length > maxFile {
		return fmt.Errorf("it has %d bytes, or is no file", info.Size())
	}
	sum, want := sha256.New(), make([]byte, sha256.Size)
	if _, err := io.Copy(sum, io.LimitReader(f, length)); err != nil {
		return err
	}
	if _, err := io.ReadFull(f, want); err != nil {
		return err
	}
	if !bytes.Equal(sum.Sum(nil), want) {
		return errors.New("its checksum differs")
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return c.decode(bufio.NewReaderSize(io.LimitReader(f, length), 256<<10))
}

func (c *Client) decode(r *bufio.Reader) error {
	head := make([]byte, len(magic))
	if _, err := io.ReadFull(r, head); err != nil || string(head) != magic {
		return errors.New("it is of another version")
	}
	record := func(limit uint64) ([]byte, error) {
		n, err := binary.ReadUvarint(r)
		if err != nil {
			return nil, err
		}
		if n > limit {
			return nil, fmt.Errorf("a record of %d bytes, at most %d are expected", n, limit)
		}
		raw := make([]byte, n)
		_, err = io.ReadFull(r, raw)
		return raw, err
	}
	epoch, err := record(1 << 10)
	if err != nil {
		return err
	}
	zone, err := record(1 << 10)
	if err != nil {
		return err
	}
	var objects []wire.Object
	var revision uint64
	for {
		kind, err := binary.ReadUvarint(r)
		if err != nil {
			return err
		}
		if kind == 0 {
			break
		}
		raw, err := record(2 * wire.MaxItem)
		if err != nil {
			return err
		}
		if kind == told {
			revision, _ = binary.Uvarint(raw)
			continue
		}
		o, err := wire.Decode(&pb.NetworkItem{Kind: pb.NetworkKind(min(kind, 1<<30)), Object: raw})
		if err != nil {
			return err
		}
		if c.note(o.Key, raw) {
			c.intern.object(&o)
			objects = append(objects, o)
		}
	}
	c.epoch = string(epoch)
	c.cfg.Store.Update(func(t *Txn) {
		for _, o := range objects {
			t.set(o)
		}
		t.SetTold(int64(revision))
		t.SetZone(string(zone))
		t.setSynced(string(epoch))
	})
	return nil
}
