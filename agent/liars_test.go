package agent_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/containerd"
)

// content is a head and spaces, of any length in little memory.
type content struct {
	mediaType, digest string
	head              []byte
	spaces            int64
}

type spaces struct{}

func (spaces) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

func newContent(mediaType string, head []byte, n int64) *content {
	c := &content{mediaType: mediaType, head: head, spaces: n}
	h := sha256.New()
	_, _ = io.Copy(h, c.reader())
	c.digest = fmt.Sprintf("sha256:%x", h.Sum(nil))
	return c
}

func (c *content) size() int64 { return int64(len(c.head)) + c.spaces }

func (c *content) reader() io.Reader {
	return io.MultiReader(bytes.NewReader(c.head), io.LimitReader(spaces{}, c.spaces))
}

func (c *content) descriptor() map[string]any {
	return map[string]any{"mediaType": c.mediaType, "digest": c.digest, "size": c.size()}
}

// liars serves images by hand, and the rest as a registry does.
type liars struct {
	http.Handler
	contents map[string]*content // by digest, and by repository
}

func (l *liars) image(t *testing.T, repository, user string, spaces int64) {
	t.Helper()
	encode := func(mediaType string, v any, n int64) *content {
		raw, err := json.Marshal(v)
		require.NoError(t, err)
		c := newContent(mediaType, raw, n)
		l.contents[c.digest] = c
		return c
	}
	const oci = "application/vnd.oci.image."
	layer := newContent(oci+"layer.v1.tar", make([]byte, 10240), 0)
	l.contents[layer.digest] = layer
	config := encode(oci+"config.v1+json", map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"User": user, "Cmd": []string{"/x"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{layer.digest}},
	}, spaces)
	l.contents[repository] = encode(oci+"manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": oci + "manifest.v1+json", "config": config.descriptor(), "layers": []any{layer.descriptor()},
	}, 0)
}

func (l *liars) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(r.URL.Path, "/")
	if len(parts) != 5 || l.contents[parts[2]] == nil {
		l.Handler.ServeHTTP(w, r)
		return
	}
	c := l.contents[parts[4]]
	if c == nil {
		c = l.contents[parts[2]]
	}
	w.Header().Set("Content-Type", c.mediaType)
	w.Header().Set("Docker-Content-Digest", c.digest)
	w.Header().Set("Content-Length", strconv.FormatInt(c.size(), 10))
	if r.Method != http.MethodHead {
		_, _ = io.Copy(w, c.reader())
	}
}

// containerdPeak is the most memory, in MB, that the node's containerd had.
func (n *testNode) containerdPeak() (mb int) {
	n.t.Helper()
	raw, err := os.ReadFile(filepath.Join(n.cfg.DataDir, "containerd", "containerd.pid"))
	require.NoError(n.t, err)
	raw, err = os.ReadFile("/proc/" + strings.Fields(string(raw))[0] + "/status")
	require.NoError(n.t, err)
	_, rest, _ := strings.Cut(string(raw), "VmHWM:")
	_, err = fmt.Sscan(rest, &mb)
	require.NoError(n.t, err)
	return mb >> 10
}

// Images whose configuration is larger than it may be, or says what makes each list of
// images too long to be read, are refused, and take neither containerd's memory nor the
// node's knowledge of its other images. Those of an honest registry come by tag and by
// digest, and a tag that was moved is what it is now.
func TestLyingRegistries(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	l := &liars{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0))), contents: map[string]*content{}}
	s := httptest.NewServer(l)
	t.Cleanup(s.Close)
	addr := strings.TrimPrefix(s.URL, "http://")
	l.image(t, "large", "", 256<<20)
	l.image(t, "user", strings.Repeat("u", 3<<20), 0)
	n.start()
	for _, repository := range []string{"large", "user"} {
		p := newPod(repository, corev1.Container{Name: "app", Image: addr + "/" + repository + ":1"})
		c.set(p)
		st := c.until(p, "refused", 60*time.Second, func(st *corev1.PodStatus) bool {
			w := st.ContainerStatuses[0].State.Waiting
			return st.ContainerStatuses[0].LastTerminationState.Terminated != nil || w != nil && w.Reason != "ContainerCreating"
		})
		require.NotNil(t, st.ContainerStatuses[0].State.Waiting)
		require.Equal(t, "ErrImagePull", st.ContainerStatuses[0].State.Waiting.Reason)
		require.Contains(t, st.ContainerStatuses[0].State.Waiting.Message, "no more than")
	}
	require.Less(t, n.containerdPeak(), 200, "MB")

	rt, err := containerd.Dial(t.Context(), filepath.Join(n.cfg.DataDir, "containerd", "containerd.sock"))
	require.NoError(t, err)
	defer rt.Close()
	list, err := rt.Images.ListImages(t.Context(), &runtimev1.ListImagesRequest{})
	require.NoError(t, err)
	for _, m := range list.Images {
		require.NotContains(t, m.RepoTags, addr+"/user:1")
	}

	img, err := tarball.ImageFromPath(filepath.Join(n.cfg.ImagesDir, "timonel-sample.tar"), nil)
	require.NoError(t, err)
	tag, err := name.NewTag(addr+"/team/app:1", name.Insecure)
	require.NoError(t, err)
	require.NoError(t, remote.Write(tag, img))
	first := newPod("first", corev1.Container{Name: "app", Image: tag.Name(), ImagePullPolicy: corev1.PullAlways})
	c.set(first)
	was := c.ready(first).ContainerStatuses[0].ImageID

	config, err := img.ConfigFile()
	require.NoError(t, err)
	config = config.DeepCopy()
	config.Config.Labels = map[string]string{"changed": "yes"}
	img, err = mutate.ConfigFile(img, config)
	require.NoError(t, err)
	require.NoError(t, remote.Write(tag, img))
	digest, err := img.Digest()
	require.NoError(t, err)
	second := newPod("second", corev1.Container{Name: "app", Image: tag.Name(), ImagePullPolicy: corev1.PullAlways})
	c.set(second)
	is := c.ready(second).ContainerStatuses[0].ImageID
	require.NotEqual(t, was, is)
	require.Contains(t, is, digest.String())
	third := newPod("third", corev1.Container{Name: "app", Image: addr + "/team/app@" + digest.String(), ImagePullPolicy: corev1.PullAlways})
	c.set(third)
	require.Equal(t, is, c.ready(third).ContainerStatuses[0].ImageID)
}
