// Command build makes the images that a Timonel cluster needs on a machine
// without a registry: timonel/pause, timonel/sample and timonel/busybox, one
// archive each (docker save format) in the folder given by -out.
//
//	go run ./images/build -out run/images
//
// It uses no network: the programs are built from this repository, and busybox
// is the machine's own static one.
//
// With -suite it makes the images too that upstream's e2e suite asks for, from the
// programs that `make conformance` built into that folder, Kubernetes' module and
// Debian's packages, in one archive, as most share their base:
//
//	go run ./images/build -out bin/conformance/images -suite bin/conformance
package main

import (
	"bytes"
	"debug/elf"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func main() {
	out := flag.String("out", "", "folder to write the image archives to")
	arch := flag.String("arch", runtime.GOARCH, "architecture of the images")
	busybox := flag.String("busybox", "/bin/busybox", "static busybox binary; without it no busybox image is made")
	suite := flag.String("suite", "", "folder of e2e.test and what else `make conformance` builds: make the suite's images, too")
	flag.Parse()
	if err := run(*out, *arch, *busybox, *suite); err != nil {
		fmt.Fprintln(os.Stderr, "images/build:", err)
		os.Exit(1)
	}
}

func run(out, arch, busybox, suite string) error {
	if out == "" {
		return fmt.Errorf("-out is empty: give the folder for the image archives")
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "timonel-images-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)

	pause, err := compile(tmp, "timonel/images/pause", arch)
	if err != nil {
		return err
	}
	if err := writeOwn(out, "pause", arch, pauseConfig, file{"pause", 0o755, pause}); err != nil {
		return err
	}
	sample, err := compile(tmp, "timonel/images/sample", arch)
	if err != nil {
		return err
	}
	if err := writeOwn(out, "sample", arch, v1.Config{
		Entrypoint: []string{"/sample"}, WorkingDir: "/",
		Env:          []string{"PATH=/usr/local/bin:/usr/bin:/bin"},
		ExposedPorts: map[string]struct{}{"8080/tcp": {}},
	}, file{"sample", 0o755, sample}); err != nil {
		return err
	}
	if busybox != "" {
		files, err := busyboxFiles(busybox)
		if err != nil {
			return err
		}
		if err := writeOwn(out, "busybox", arch, busyboxConfig, files...); err != nil {
			return err
		}
	}
	if suite != "" {
		sh, err := compile(tmp, "timonel/images/sh", arch)
		if err != nil {
			return err
		}
		return writeSuite(suite, out, arch, busybox, pause, sh)
	}
	return nil
}

var (
	pauseConfig   = v1.Config{Entrypoint: []string{"/pause"}, User: "65535:65535"}
	busyboxConfig = v1.Config{Cmd: []string{"sh"}, Env: []string{"PATH=/bin"}, WorkingDir: "/"}
)

func compile(dir, pkg, arch string) ([]byte, error) {
	bin := filepath.Join(dir, filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build %s: %w\n%s", pkg, err, msg)
	}
	return os.ReadFile(bin)
}

// busyboxFiles is a root folder with a shell and the usual tools from the
// machine's static busybox.
func busyboxFiles(path string) ([]file, error) {
	data, err := static(path, "busybox-static")
	if err != nil {
		return nil, err
	}
	list, err := applets(path)
	if err != nil {
		return nil, err
	}
	files := []file{
		{"bin/", 0o755, nil}, {"etc/", 0o755, nil}, {"root/", 0o700, nil}, {"tmp/", 0o1777, nil}, {"home/", 0o755, nil},
		{"etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n")},
		{"etc/group", 0o644, []byte("root:x:0:\nnobody:x:65534:\n")},
		{"bin/busybox", 0o755, data},
	}
	for _, applet := range list {
		files = append(files, file{"bin/" + applet, 0o777 | symlink, []byte("busybox")})
	}
	return files, nil
}

// applets are the names that busybox answers to, but for its own.
func applets(busybox string) ([]string, error) {
	out, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list: %w", busybox, err)
	}
	var list []string
	for _, applet := range bytes.Fields(out) {
		if string(applet) != "busybox" {
			list = append(list, string(applet))
		}
	}
	return list, nil
}

// static reads a program that needs no libraries, which that Debian package has.
func static(path, pkg string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w; install it with: apt-get install %s", err, pkg)
	}
	bin, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, p := range bin.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("%s is not static; install one that is with: apt-get install %s", path, pkg)
		}
	}
	return data, nil
}
