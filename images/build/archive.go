package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
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

// file is one entry of a layer: a folder when its name ends in a slash, a symbolic
// link when its mode says so.
type file struct {
	name string
	mode int64
	data []byte
}

const symlink = 1 << 40 // marks file.data as a link's target

// writeOwn makes the image timonel/NAME:latest and its archive OUT/timonel-NAME.tar.
func writeOwn(out, image, arch string, config v1.Config, files ...file) error {
	layer, err := layerOf(files)
	if err != nil {
		return fmt.Errorf("image %s: %w", image, err)
	}
	img, err := assemble(arch, config, layer)
	if err != nil {
		return fmt.Errorf("image %s: %w", image, err)
	}
	return save(filepath.Join(out, "timonel-"+image+".tar"), map[string]v1.Image{"timonel/" + image + ":latest": img})
}

// layerOf makes a layer of files.
func layerOf(files []file, options ...tarball.LayerOption) (v1.Layer, error) {
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		var b bytes.Buffer
		if err := writeTar(&b, files); err != nil {
			return nil, err
		}
		return io.NopCloser(&b), nil
	}, options...)
}

// assemble makes an image of layers, the lowest first.
func assemble(arch string, config v1.Config, layers ...v1.Layer) (v1.Image, error) {
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Created, cf.Config = "linux", arch, v1.Time{Time: epoch}, config
	return mutate.ConfigFile(img, cf)
}

// save writes the archive of images, by name, which have what they share in it once,
// and says what it wrote.
func save(path string, images map[string]v1.Image) error {
	tagged := map[name.Tag]v1.Image{}
	for ref, img := range images {
		tag, err := name.NewTag(ref)
		if err != nil {
			return err
		}
		tagged[tag] = img
	}
	if err := tarball.MultiWriteToFile(path+".new", tagged); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	for tag, img := range tagged {
		digest, err := img.Digest()
		if err != nil {
			return err
		}
		fmt.Printf("%s: %s %s\n", path, tag.Name(), digest)
	}
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
