package main

import "testing"

func TestShellFor(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		environ []string
		want    string
	}{
		{nil, "/bin/busybox"},
		{[]string{"PATH=/bin", "_A1=x=y", "EMPTY="}, "/bin/busybox"},
		{[]string{"PATH=/bin", "data-1=x"}, "/bin/bash"},
		{[]string{"1data=x"}, "/bin/bash"},
		{[]string{"p.q=x"}, "/bin/bash"},
	} {
		if got := shellFor(tt.environ); got != tt.want {
			t.Errorf("shell for %q is %s, want %s", tt.environ, got, tt.want)
		}
	}
}
