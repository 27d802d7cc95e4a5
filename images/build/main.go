// Command build makes the images that a Timonel cluster needs on a machine
// without a registry: timonel/pause, timonel/sample and timonel/busybox, one
// archive each (docker save format) in the folder given by -out.
//
//	go run ./images/build -out run/images
//
// It uses no network: the programs are built from this repository, and busybox
// is the machine's own static one.
package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// epoch is every file's and image's time, so that the same source gives the
// same digest.
var epoch = time.Unix(0, 0).UTC()

func main() {
	out := flag.String("out", "", "folder to write the image archives to")
	arch := flag.String("arch", runtime.GOARCH, "architecture of the images")
	busybox := flag.String("busybox", "/bin/busybox", "static busybox binary; without it no busybox image is made")
	flag.Parse()
	if err := run(*out, *arch, *busybox); err != nil {
		fmt.Fprintln(os.Stderr, "images/build:", err)
		os.Exit(1)
	}
}

func run(out, arch, busybox string) error {
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
	if err := write(out, "pause", arch, v1.Config{
		Entrypoint: []string{"/pause"}, User: "65535:65535",
	}, file{"pause", 0o755, pause}); err != nil {
		return err
	}
	sample, err := compile(tmp, "timonel/images/sample", arch)
	if err != nil {
		return err
	}
	if err := write(out, "sample", arch, v1.Config{
		Entrypoint: []string{"/sample"}, WorkingDir: "/",
		Env:          []string{"PATH=/usr/local/bin:/usr/bin:/bin"},
		ExposedPorts: map[string]struct{}{"8080/tcp": {}},
	}, file{"sample", 0o755, sample}); err != nil {
		return err
	}
	return writeBusybox(out, arch, busybox)
}

// file is one entry of an image's only layer: a folder when its name ends in a
// slash, a symbolic link when its mode says so.
type file struct {
	name string
	mode int64
	data []byte
}

const symlink = 1 << 40 // marks file.data as a link's target

func compile(dir, pkg, arch string) ([]byte, error) {
	bin := filepath.Join(dir, filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build %s: %w\n%s", pkg, err, msg)
	}
	return os.ReadFile(bin)
}

// writeBusybox makes an image with a shell and the usual tools from the
// machine's static busybox.
func writeBusybox(out, arch, path string) error {
	if path == "" {
		return nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("busybox: %w; install it with: apt-get install busybox-static (or leave it out with -busybox '')", err)
	}
	bin, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("busybox: %s: %w", path, err)
	}
	for _, p := range bin.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("busybox: %s is not static; install it with: apt-get install busybox-static", path)
		}
	}
	list, err := exec.Command(path, "--list").Output()
	if err != nil {
		return fmt.Errorf("busybox: %s --list: %w", path, err)
	}
	files := []file{
		{"bin/", 0o755, nil}, {"etc/", 0o755, nil}, {"root/", 0o700, nil}, {"tmp/", 0o1777, nil}, {"home/", 0o755, nil},
		{"etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n")},
		{"etc/group", 0o644, []byte("root:x:0:\nnobody:x:65534:\n")},
		{"bin/busybox", 0o755, data},
	}
	for _, applet := range bytes.Fields(list) {
		if string(applet) != "busybox" {
			files = append(files, file{"bin/" + string(applet), 0o777 | symlink, []byte("busybox")})
		}
	}
	return write(out, "busybox", arch, v1.Config{
		Cmd: []string{"sh"}, Env: []string{"PATH=/bin"}, WorkingDir: "/",
	}, files...)
}

// write makes the image timonel/NAME:latest and its archive OUT/timonel-NAME.tar.
func write(out, image, arch string, config v1.Config, files ...file) error {
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		var b bytes.Buffer
		if err := writeTar(&b, files); err != nil {
			return nil, err
		}
		return io.NopCloser(&b), nil
	})
	if err != nil {
		return fmt.Errorf("image %s: %w", image, err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return fmt.Errorf("image %s: %w", image, err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("image %s: %w", image, err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Created, cf.Config = "linux", arch, v1.Time{Time: epoch}, config
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		return fmt.Errorf("image %s: %w", image, err)
	}
	tag, err := name.NewTag("timonel/" + image + ":latest")
	if err != nil {
		return err
	}
	path := filepath.Join(out, "timonel-"+image+".tar")
	if err := tarball.WriteToFile(path+".new", tag, img); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	digest, err := img.Digest()
	if err != nil {
		return err
	}
	fmt.Printf("%s: %s %s\n", path, tag.Name(), digest)
	return nil
}

func writeTar(w io.Writer, files []file) error {
	tw := tar.NewWriter(w)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode &^ symlink, ModTime: epoch, Typeflag: tar.TypeReg, Size: int64(len(f.data))}
		switch {
		case f.mode&symlink != 0:
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, string(f.data), 0
		case f.name[len(f.name)-1] == '/':
			h.Typeflag = tar.TypeDir
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := tw.Write(f.data); err != nil {
				return err
			}
		}
	}
	return tw.Close()
}
