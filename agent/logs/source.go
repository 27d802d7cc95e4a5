package logs

import "os"

// source is one file of a log that is being read. Fields are guarded by the
// log's mu.
type source struct {
	seq int64 // the log's when it was the file that is written to
	f   *os.File
}
