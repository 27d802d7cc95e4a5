//go:build chaos

package chaos

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"timonel/test/harness"
)

// pid is the host's number of a controller's process.
func pid(t *testing.T, c *harness.Cluster, name string) int {
	t.Helper()
	state, err := c.Spec.Machine(name).State(t.Context())
	require.NoError(t, err)
	require.NotZero(t, state.Main.Pid, "%s does not run", name)
	return state.Main.Pid
}

// syscalls lets some of a controller's system calls fail or take long, as strace's
// --inject says, until the function it returns is called.
func syscalls(t *testing.T, c *harness.Cluster, name, calls, inject string) (stop func()) {
	t.Helper()
	var said bytes.Buffer
	cmd := exec.Command("strace", "-f", "-p", strconv.Itoa(pid(t, c, name)), "-o", "/dev/null",
		"-e", "trace="+calls, "-e", "signal=none", "-e", "inject="+calls+":"+inject)
	cmd.Stdout, cmd.Stderr = &said, &said
	require.NoError(t, cmd.Start(), "strace is needed: `.ci/deps chaos` installs it")
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("strace of %s: %v: %s", name, err, said.String())
	case <-time.After(200 * time.Millisecond): // it has attached, or is about to
	}
	return func() {
		_ = cmd.Process.Signal(unix.SIGINT) // it lets go of the process; gone already is fine
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Errorf("strace of %s does not end: %s", name, said.String())
			_ = cmd.Process.Kill()
		}
	}
}

// diskFull lets all writes to places in files fail: those to the log.
func diskFull(t *testing.T, c *harness.Cluster, name string) (stop func()) {
	return syscalls(t, c, name, "pwrite64,fallocate", "error=ENOSPC")
}

// fsyncFails lets all syncs fail.
func fsyncFails(t *testing.T, c *harness.Cluster, name string) (stop func()) {
	return syscalls(t, c, name, "fsync,fdatasync", "error=EIO")
}

// diskSlow lets each sync take that much longer.
func diskSlow(t *testing.T, c *harness.Cluster, name string, by time.Duration) (stop func()) {
	return syscalls(t, c, name, "fsync,fdatasync", fmt.Sprintf("delay_enter=%d", by.Microseconds()))
}

// clockSkew sets a controller's wall clock forward or back, for that process alone,
// until it ends or the function it returns is called. Its programs read the clock
// with the kernel's vDSO, of which a process has its own copy as soon as somebody
// writes to it: here a function that asks the kernel and adds the difference.
func clockSkew(t *testing.T, c *harness.Cluster, name string, by time.Duration) (stop func()) {
	t.Helper()
	id := pid(t, c, name)
	begin, end := vdso(t, id)
	memory, err := os.OpenFile(filepath.Join("/proc", strconv.Itoa(id), "mem"), os.O_RDWR, 0)
	require.NoError(t, err)
	defer memory.Close()
	image := make([]byte, end-begin)
	_, err = memory.ReadAt(image, int64(begin))
	require.NoError(t, err)
	file, err := elf.NewFile(bytes.NewReader(image))
	require.NoError(t, err)
	require.Equal(t, elf.EM_X86_64, file.Machine, "clocks are skewed on amd64 only")
	symbols, err := file.DynamicSymbols()
	require.NoError(t, err)
	at := uint64(0)
	for _, s := range symbols {
		if s.Name == "__vdso_clock_gettime" {
			at = s.Value
		}
	}
	require.NotZero(t, at, "the vDSO has no clock_gettime")

	code := []byte{
		0xb8, 228, 0, 0, 0, // mov eax, SYS_clock_gettime
		0x0f, 0x05, // syscall
		0x85, 0xff, // test edi, edi: CLOCK_REALTIME is 0
		0x75, 0x07, // jne to ret
		0x48, 0x81, 0x06, 0, 0, 0, 0, // add qword [rsi], seconds
		0xc3, // ret
	}
	binary.LittleEndian.PutUint32(code[14:], uint32(int32(by/time.Second)))
	original := bytes.Clone(image[at : at+uint64(len(code))])
	write := func(b []byte) {
		stopped(t, id, begin, end, func() {
			f, err := os.OpenFile(filepath.Join("/proc", strconv.Itoa(id), "mem"), os.O_RDWR, 0)
			require.NoError(t, err)
			defer f.Close()
			_, err = f.WriteAt(b, int64(begin+at))
			require.NoError(t, err)
		})
	}
	write(code)
	return func() { write(original) }
}

// stopped runs f while the process is stopped and no thread of it is in the vDSO.
func stopped(t *testing.T, id int, begin, end uint64, f func()) {
	t.Helper()
	for range 200 {
		require.NoError(t, unix.Kill(id, unix.SIGSTOP))
		time.Sleep(20 * time.Millisecond)
		if busy := inside(t, id, begin, end); !busy {
			f()
			require.NoError(t, unix.Kill(id, unix.SIGCONT))
			return
		}
		require.NoError(t, unix.Kill(id, unix.SIGCONT))
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("some thread is always reading the clock")
}

// inside reports whether a thread of a stopped process is in a range of addresses,
// or is not known to be elsewhere.
func inside(t *testing.T, id int, begin, end uint64) bool {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", id))
	require.NoError(t, err)
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			continue // the thread ended
		}
		fields := strings.Fields(string(content)) // number, arguments, stack, place; or "running"
		if len(fields) < 3 {
			return true
		}
		place, err := strconv.ParseUint(strings.TrimPrefix(fields[len(fields)-1], "0x"), 16, 64)
		require.NoError(t, err)
		if place >= begin && place < end {
			return true
		}
	}
	return len(files) == 0
}

// vdso is where a process has it.
func vdso(t *testing.T, id int) (begin, end uint64) {
	t.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", id))
	require.NoError(t, err)
	for line := range strings.Lines(string(content)) {
		if strings.HasSuffix(strings.TrimSpace(line), "[vdso]") {
			_, err := fmt.Sscanf(line, "%x-%x", &begin, &end)
			require.NoError(t, err)
		}
	}
	require.NotZero(t, end, "process %d has no vDSO", id)
	return begin, end
}
