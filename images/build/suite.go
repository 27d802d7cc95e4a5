package main

import (
	"compress/gzip"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// registries says which names the suite gives its images: each on a registry that is
// nowhere, so that a missing image is looked for on this machine alone.
const registries = "test/conformance/registries.yaml"

// suite makes the images that upstream's e2e suite asks for.
type suite struct {
	dir, arch, busybox string
	module             string // the folder of k8s.io/kubernetes
	pause, sh          []byte
	debian             v1.Layer // the base of most
}

// errNoRecipe says that nothing here makes that image. Tests that need it fail.
var errNoRecipe = errors.New("no recipe")

// writeSuite makes the archive OUT/suite.tar of all that the suite in dir names and
// that there is a recipe for, and says what there is none for.
func writeSuite(dir, out, arch, busybox string, pause, sh []byte) error {
	names, err := suiteNames(filepath.Join(dir, "e2e.test"))
	if err != nil {
		return err
	}
	module, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes").Output()
	if err != nil {
		return fmt.Errorf("find the module k8s.io/kubernetes: %w; is this Timonel's folder?", err)
	}
	s := &suite{dir: dir, arch: arch, busybox: busybox, module: strings.TrimSpace(string(module)), pause: pause, sh: sh}
	if s.debian, err = debianLayer(filepath.Join(dir, "debian.tar"), busybox); err != nil {
		return err
	}
	images := map[string]v1.Image{}
	made := map[string]v1.Image{} // by the name's last element; two versions may be one image
	var missing []string
	for _, ref := range names {
		base, _, _ := strings.Cut(path.Base(ref), ":")
		if strings.Contains(ref, "/private/") {
			base = "" // tests want a refusal
		}
		if made[base] == nil {
			img, err := s.image(base)
			if errors.Is(err, errNoRecipe) {
				missing = append(missing, ref)
				continue
			}
			if err != nil {
				return fmt.Errorf("image %s: %w", ref, err)
			}
			made[base] = img
		}
		images[ref] = made[base]
	}
	if err := save(filepath.Join(out, "suite.tar"), images); err != nil {
		return err
	}
	fmt.Printf("no recipe for %d images of the suite: %s\n", len(missing), strings.Join(missing, " "))
	return nil
}

// suiteNames asks the suite which images it may use.
func suiteNames(program string) ([]string, error) {
	cmd := exec.Command(program, "--list-images", "--kube-test-repo-list", registries)
	list, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list the suite's images: %w (make conformance builds %s)", err, program)
	}
	names := strings.Fields(string(list))
	slices.Sort(names)
	return slices.Compact(names), nil
}

// image makes the image whose name ends in that.
func (s *suite) image(name string) (v1.Image, error) {
	switch name {
	case "pause":
		return s.of(pauseConfig, false, file{"pause", 0o755, s.pause})
	case "busybox":
		files, err := busyboxFiles(s.busybox)
		if err != nil {
			return nil, err
		}
		bash, err := static("/bin/bash-static", "bash-static")
		if err != nil {
			return nil, err
		}
		files = slices.DeleteFunc(files, func(f file) bool { return f.name == "bin/sh" || f.name == "bin/bash" })
		return s.of(busyboxConfig, false, append(files, file{"bin/sh", 0o755, s.sh}, file{"bin/bash", 0o755, bash})...)
	case "agnhost":
		return s.agnhost("pause")
	case "kitten", "nautilus":
		picture, err := s.source(name+"/html/"+name+".jpg", name+".jpg")
		if err != nil {
			return nil, err
		}
		data, err := s.source(name+"/html/data.json", "data.json")
		if err != nil {
			return nil, err
		}
		// Upstream's are made on Alpine, and a test that mounts one looks for that.
		release := file{"etc/os-release", 0o644, []byte("NAME=\"Alpine Linux\"\nID=alpine\n")}
		return s.agnhost("test-webserver", picture, data, release)
	case "nonroot":
		return s.of(v1.Config{User: "1234", Env: debianEnv, Cmd: []string{"bash"}}, true)
	case "perl":
		return s.of(v1.Config{Env: debianEnv, Cmd: []string{"perl", "-de0"}}, true)
	case "glibc-dns-testing", "ipc-utils":
		return s.of(v1.Config{Env: debianEnv, Cmd: []string{"bash"}}, true)
	case "nginx":
		return s.of(v1.Config{Env: debianEnv, Cmd: []string{"nginx", "-g", "daemon off;"}, StopSignal: "SIGQUIT",
			ExposedPorts: map[string]struct{}{"80/tcp": {}}}, true, nginxFiles...)
	case "nonewprivs": // as whom it runs, which the bit makes root where it counts
		data, err := s.programData(name)
		if err != nil {
			return nil, err
		}
		return s.of(v1.Config{Env: debianEnv, Cmd: []string{"nnp"}}, true, file{"usr/local/bin/nnp", 0o6755, data})
	case "sample-apiserver":
		return s.program(name, v1.Config{Entrypoint: []string{"/sample-apiserver"}}, "sample-apiserver")
	case "etcd":
		return s.program(name, v1.Config{Env: debianEnv}, "usr/local/bin/etcd")
	}
	return nil, errNoRecipe
}

// nginxFiles are where upstream's image has them.
var nginxFiles = []file{
	{"etc/nginx/nginx.conf", 0o644, []byte(`worker_processes 1;
error_log stderr;
pid /run/nginx.pid;
events { worker_connections 1024; }
http {
    include /etc/nginx/mime.types;
    access_log /dev/stdout;
    server {
        listen 80;
        location / { root /usr/share/nginx/html; index index.html; }
    }
}
`)},
	{"usr/share/nginx/html/", 0o755, nil},
	{"usr/share/nginx/html/index.html", 0o644, []byte("<!DOCTYPE html>\n<html><head><title>Welcome to nginx!</title></head>\n<body><h1>Welcome to nginx!</h1></body></html>\n")},
}

// agnhost is an image of the suite's main program, which does that if not told
// otherwise, and of further files.
func (s *suite) agnhost(command string, more ...file) (v1.Image, error) {
	files := []file{
		{"agnhost-2", 0o777 | symlink, []byte("agnhost")}, // tests replace the entry point by it
		{"uploads/", 0o755, nil},
		// Tests expect a user of the image's in a group of the image's.
		{"etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/sbin/nologin\nuser-defined-in-image:x:1000:1000::/:/bin/sh\n")},
		{"etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n")},
	}
	for _, name := range []string{"localhost.crt", "localhost.key"} {
		f, err := s.source("agnhost/porter/"+name, name)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	ports := map[string]struct{}{}
	for _, port := range []string{"80", "5000", "8080", "8081", "9376"} {
		ports[port+"/tcp"] = struct{}{}
	}
	return s.program("agnhost", v1.Config{Env: debianEnv, Entrypoint: []string{"/agnhost"}, Cmd: []string{command}, ExposedPorts: ports},
		"agnhost", append(files, more...)...)
}

// source is a file that goes with the source of upstream's images.
func (s *suite) source(from, to string) (file, error) {
	data, err := os.ReadFile(filepath.Join(s.module, "test/images", from))
	return file{to, 0o644, data}, err
}

// program is an image with that program of the suite's folder, and files.
func (s *suite) program(name string, config v1.Config, to string, files ...file) (v1.Image, error) {
	data, err := s.programData(name)
	if err != nil {
		return nil, err
	}
	return s.of(config, true, append([]file{{to, 0o755, data}}, files...)...)
}

func (s *suite) programData(name string) ([]byte, error) {
	data, err := os.ReadFile(filepath.Join(s.dir, name))
	if err != nil {
		return nil, fmt.Errorf("%w (make conformance builds it)", err)
	}
	return data, nil
}

// of makes an image of files, on Debian or on nothing.
func (s *suite) of(config v1.Config, debian bool, files ...file) (v1.Image, error) {
	var layers []v1.Layer
	if debian {
		layers = append(layers, s.debian)
	}
	if len(files) > 0 {
		layer, err := layerOf(files, tarball.WithCompressionLevel(gzip.BestSpeed))
		if err != nil {
			return nil, err
		}
		layers = append(layers, layer)
	}
	return assemble(s.arch, config, layers...)
}
