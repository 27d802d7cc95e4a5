package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// debianPackages are what the suite's images have of tools, beside Debian's least.
var debianPackages = []string{"bash", "bind9-dnsutils", "ca-certificates", "curl", "iperf", "iproute2", "netcat-openbsd", "nginx", "perl-base", "socat", "util-linux", "wget"}

// debianEnv is what a process finds in an image that is made on Debian.
var debianEnv = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

// leftOut is what no test looks for in an image.
var leftOut = []string{"boot", "dev", "proc", "sys", "run", "tmp", "debootstrap", "usr/share/doc", "usr/share/man", "usr/share/info",
	"usr/share/locale", "usr/share/zoneinfo", "usr/share/lintian", "usr/share/bug", "var/cache", "var/lib/apt", "var/log"}

// debianLayer is a root folder of this machine's release and mirror, made with
// debootstrap (which takes root) when the archive is not there yet.
func debianLayer(archive, busybox string) (v1.Layer, error) {
	if _, err := os.Stat(archive); errors.Is(err, fs.ErrNotExist) {
		if err := debootstrap(archive, busybox); err != nil {
			return nil, fmt.Errorf("make the Debian root folder: %w", err)
		}
	}
	return tarball.LayerFromFile(archive, tarball.WithCompressionLevel(gzip.BestSpeed))
}

func debootstrap(archive, busybox string) error {
	suite, mirror, components, err := release()
	if err != nil {
		return err
	}
	root, err := os.MkdirTemp(filepath.Dir(archive), "debian-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(root)
	cmd := exec.Command("debootstrap", "--variant=minbase", "--components="+components,
		"--include="+strings.Join(debianPackages, ","), suite, root, mirror)
	// Packages' scripts start no service in there: there is no init to ask.
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, msg[max(0, len(msg)-2000):])
	}
	if err := finish(root, busybox); err != nil {
		return err
	}
	f, err := os.Create(archive + ".new")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := writeFolder(f, root); err != nil {
		return err
	}
	return os.Rename(archive+".new", archive)
}

// release is what apt of this machine is set up for.
func release() (suite, mirror, components string, err error) {
	codename, err := exec.Command("sh", "-c", `. /etc/os-release && echo "$VERSION_CODENAME"`).Output()
	if err != nil {
		return "", "", "", fmt.Errorf("read /etc/os-release: %w", err)
	}
	list, err := exec.Command("apt-get", "indextargets", "--format", "$(CODENAME) $(SITE) $(COMPONENT)", "Created-By: Packages").Output()
	if err != nil {
		return "", "", "", fmt.Errorf("ask apt for its mirror: %w", err)
	}
	suite = strings.TrimSpace(string(codename))
	var all []string
	for line := range strings.Lines(string(list)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == suite && (mirror == "" || f[1] == mirror) {
			mirror = f[1]
			all = append(all, f[2])
		}
	}
	if mirror == "" {
		return "", "", "", fmt.Errorf("apt knows no mirror of %q: see its sources and run apt-get update", suite)
	}
	slices.Sort(all)
	return suite, mirror, strings.Join(slices.Compact(all), ","), nil
}

// finish makes bash the `sh`, for it leaves variables in the environment whose names
// are no shell names, and adds what busybox has and Debian's least has not.
func finish(root, busybox string) error {
	sh := filepath.Join(root, "usr/bin/sh")
	if err := os.Remove(sh); err != nil {
		return err
	}
	if err := os.Symlink("bash", sh); err != nil {
		return err
	}
	data, err := static(busybox, "busybox-static")
	if err != nil {
		return err
	}
	list, err := applets(busybox)
	if err != nil {
		return err
	}
	own := filepath.Join(root, "usr/local/bin")
	if err := os.WriteFile(filepath.Join(own, "busybox"), data, 0o755); err != nil {
		return err
	}
	for _, applet := range list {
		there := false
		for _, dir := range []string{"usr/bin", "usr/sbin"} {
			if _, err := os.Lstat(filepath.Join(root, dir, applet)); err == nil {
				there = true
			}
		}
		if !there {
			if err := os.Symlink("busybox", filepath.Join(own, applet)); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeFolder writes the files below root, but for what no test looks for, with their
// owners and modes, and the epoch as their time.
func writeFolder(w io.Writer, root string) error {
	tw := tar.NewWriter(w)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil || name == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var target string
		if info.Mode()&fs.ModeSymlink != 0 {
			if target, err = os.Readlink(path); err != nil {
				return err
			}
		} else if !d.IsDir() && !info.Mode().IsRegular() {
			return nil
		}
		h, err := tar.FileInfoHeader(info, target)
		if err != nil {
			return err
		}
		h = &tar.Header{Typeflag: h.Typeflag, Name: name, Linkname: target, Size: h.Size, Mode: h.Mode, Uid: h.Uid, Gid: h.Gid, ModTime: epoch}
		if d.IsDir() {
			h.Name += "/"
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if d.IsDir() && slices.Contains(leftOut, name) {
			return fs.SkipDir
		}
		if !info.Mode().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		_, err = io.Copy(tw, bytes.NewReader(data))
		return err
	})
	if err != nil {
		return err
	}
	return tw.Close()
}
