package machines

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// What the host asks process 1 of a machine over its socket: one JSON request
// and one JSON reply a connection.
type request struct {
	Op      string  `json:"op"`
	Process Process `json:"process"`
}

const (
	opStart  = "start"
	opStatus = "status"
)

type reply struct {
	Pid     int       `json:"pid"` // of the main process inside the machine; 0: it does not run
	Started time.Time `json:"started"`
	Exited  string    `json:"exited"`
	Error   string    `json:"error"`
}

// call asks the machine's process 1.
func (m *Machine) call(ctx context.Context, r request) (reply, error) {
	// The path of a socket is limited to 108 bytes; the folder's is not.
	dir, err := os.Open(m.Dir)
	if err != nil {
		return reply{}, err
	}
	defer dir.Close()
	path := filepath.Join("/proc/self/fd", strconv.Itoa(int(dir.Fd())), "init.sock")
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return reply{}, fmt.Errorf("process 1 does not answer: %w", err)
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		return reply{}, fmt.Errorf("ask process 1: %w", err)
	}
	var answer reply
	if err := json.NewDecoder(conn).Decode(&answer); err != nil {
		return reply{}, fmt.Errorf("process 1's answer: %w", err)
	}
	return answer, nil
}
