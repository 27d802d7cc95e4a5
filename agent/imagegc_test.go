package agent_test

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/containerd"
	"timonel/agent/imagegc"
)

// tags are the names of the images that containerd has.
func (n *testNode) tags() []string {
	n.t.Helper()
	rt, err := containerd.Dial(n.t.Context(), filepath.Join(n.cfg.DataDir, "containerd", "containerd.sock"))
	require.NoError(n.t, err)
	defer rt.Close()
	list, err := rt.Images.ListImages(n.t.Context(), &runtimev1.ListImagesRequest{})
	require.NoError(n.t, err)
	var out []string
	for _, m := range list.Images {
		out = append(out, m.RepoTags...)
	}
	slices.Sort(out)
	return out
}

// When the images' file system is over the threshold, images that no pod uses go;
// those in use, of containers that have ended too, and those that came from files
// stay, also when the folder of files is gone.
func TestUnusedImagesAreCollected(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	addr := n.serveRegistry(t, "pat", "s3cret")
	sample, err := tarball.ImageFromPath(filepath.Join(n.cfg.ImagesDir, "timonel-sample.tar"), nil)
	require.NoError(t, err)
	image := func(app string) string {
		ref := addr + "/" + app + ":1"
		file, err := sample.ConfigFile()
		require.NoError(t, err)
		config := *file.Config.DeepCopy()
		config.Labels = map[string]string{"app": app} // another image than the one that was imported
		img, err := mutate.Config(sample, config)
		require.NoError(t, err)
		tag, err := name.NewTag(ref, name.Insecure)
		require.NoError(t, err)
		require.NoError(t, remote.Write(tag, img, remote.WithAuth(&authn.Basic{Username: "pat", Password: "s3cret"})))
		return ref
	}
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "pull"}, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(`{"auths":{"` + addr + `":{"username":"pat","password":"s3cret"}}}`)},
	}
	c.object("Secret", secret)
	pod := func(name, image string) *corev1.Pod {
		p := newPod(name, corev1.Container{Name: "app", Image: image})
		p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "pull"}}
		c.set(p)
		return p
	}
	running, ended, gone := image("running"), image("ended"), image("gone")

	n.start()
	archives, err := filepath.Glob(filepath.Join(n.cfg.ImagesDir, "*.tar"))
	require.NoError(t, err)
	var imported []string
	require.Eventually(t, func() bool { imported = n.tags(); return len(imported) == len(archives) }, time.Minute, 50*time.Millisecond)
	pods := []*corev1.Pod{pod("running", running), pod("ended", ended), pod("gone", gone)}
	for _, p := range pods {
		c.ready(p)
	}
	deadline := int64(1)
	over := pods[1].DeepCopy()
	over.Spec.ActiveDeadlineSeconds = &deadline
	c.set(over)
	c.until(over, "failed", time.Minute, func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodFailed })
	c.delete(pods[2], 1)
	require.Equal(t, sorted(imported, running, ended, gone), n.tags(), "nothing goes while there is room")

	t.Log("the threshold is one that any file system is over, and the folder of images is another one")
	n.stop()
	empty := t.TempDir()
	n.cfg.ImagesDir = empty
	n.cfg.ImageGC, n.cfg.ImageGCInterval = &imagegc.Policy{High: 1, Low: 0}, 500*time.Millisecond
	n.start()
	require.Eventually(t, func() bool { return !slices.Contains(n.tags(), gone) }, time.Minute, 50*time.Millisecond)
	require.Equal(t, sorted(imported, running, ended), n.tags())
	c.wait("events about it", time.Minute, func() bool {
		found := map[string]bool{}
		for _, e := range c.events {
			if e.InvolvedObject.Kind == "Node" && e.InvolvedObject.Name == "a1" && strings.Contains(e.Message, "Insufficient free disk space") {
				found[e.Reason] = true
			}
		}
		return found["FreeDiskSpaceFailed"] && found["ImageGCFailed"]
	})

	t.Log("what is needed again is pulled again, and then stays")
	again := pod("again", gone)
	c.ready(again)
	c.delete(over, 1)
	require.Eventually(t, func() bool { return !slices.Contains(n.tags(), ended) }, time.Minute, 50*time.Millisecond)
	require.Equal(t, sorted(imported, running, gone), n.tags())
	c.ready(newImported(c))
}

// newImported is a pod of an image that came from a file.
func newImported(c *controller) *corev1.Pod {
	p := newPod("imported", corev1.Container{Name: "app", Image: "timonel/sample", ImagePullPolicy: corev1.PullNever})
	c.set(p)
	return p
}

func sorted(list []string, more ...string) []string {
	out := slices.Concat(list, more)
	slices.Sort(out)
	return out
}
