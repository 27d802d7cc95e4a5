package apiserver

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/pki"
	"timonel/state"
	"timonel/state/storage/storagetest"
)

// TestReplicasShareAState starts three replicas of one state at once, as a
// cluster does, and watches them come to rest.
func TestReplicasShareAState(t *testing.T) {
	bundle, err := pki.CreateBundle(filepath.Join(t.TempDir(), "bundle"))
	if err != nil {
		t.Fatal(err)
	}
	var controllers []net.IP
	for i := range 3 {
		controllers = append(controllers, net.IPv4(192, 0, 2, byte(11+i)))
	}
	backend := storagetest.NewLocalBackend(state.Options{})
	replicas := make([]*fixture, len(controllers))
	var starting sync.WaitGroup
	for i := range replicas {
		starting.Go(func() {
			replicas[i], err = startFixture(backend, bundle, func(c *Config) {
				c.Name = fmt.Sprint("c", i+1)
				c.AdvertiseAddress = controllers[i]
				c.Controllers = func() []net.IP { return controllers }
				c.IsLeader = func() bool { return i == 1 }
			})
			if err != nil {
				t.Errorf("replica %d: %v", i+1, err)
			}
		})
	}
	starting.Wait()
	for _, replica := range replicas {
		if replica != nil {
			t.Cleanup(func() {
				if err := replica.stop(); err != nil {
					t.Error(err)
				}
			})
		}
	}
	if t.Failed() {
		t.FailNow()
	}

	t.Run("endpoints are the controllers", func(t *testing.T) {
		c := client(t, replicas[0].admin())
		eventually(t, 15*time.Second, func() error {
			slice, err := c.DiscoveryV1().EndpointSlices("default").Get(within(t, 5*time.Second), "kubernetes", metav1.GetOptions{})
			if err == nil && len(slice.Endpoints) != len(controllers) {
				err = fmt.Errorf("endpoints %v", slice.Endpoints)
			}
			return err
		})
	})
	t.Run("a token of one is good for all", func(t *testing.T) {
		first := client(t, replicas[0].admin())
		ns := namespace(t, first)
		account(t, first, ns)
		token, err := first.CoreV1().ServiceAccounts(ns).CreateToken(within(t, 5*time.Second), "default", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		review, err := client(t, replicas[2].admin()).AuthenticationV1().TokenReviews().Create(within(t, 5*time.Second),
			&authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token.Status.Token}}, metav1.CreateOptions{})
		if err != nil || !review.Status.Authenticated {
			t.Errorf("review: %+v, %v", review.Status, err)
		}
	})
	t.Run("node ports are unique", func(t *testing.T) {
		ns := namespace(t, client(t, replicas[0].admin()))
		var mu sync.Mutex
		ports := map[int32]string{}
		var wg sync.WaitGroup
		for i := range 30 {
			c := client(t, replicas[i%3].admin())
			wg.Go(func() {
				service, err := c.CoreV1().Services(ns).Create(within(t, 20*time.Second), &corev1.Service{
					ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("s", i)},
					Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, Ports: []corev1.ServicePort{{Port: 80}}},
				}, metav1.CreateOptions{})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				port := service.Spec.Ports[0].NodePort
				if other, taken := ports[port]; taken {
					t.Errorf("%s has node port %d, of %s", service.Name, port, other)
				}
				ports[port] = service.Name
			})
		}
		wg.Wait()
	})
	t.Run("nothing is written at rest", func(t *testing.T) {
		if testing.Short() {
			t.Skip("takes 20 s")
		}
		store := backend.Store()
		var settled int64
		since := time.Now()
		for limit := time.Now().Add(time.Minute); time.Since(since) < 12*time.Second; time.Sleep(200 * time.Millisecond) {
			if revision := store.View().Revision(); revision != settled {
				settled, since = revision, time.Now()
			}
			if time.Now().After(limit) {
				t.Fatalf("still writing after a minute; now at revision %d", settled)
			}
		}
		watcher, err := store.Watch("/", settled)
		if err != nil {
			t.Fatal(err)
		}
		defer watcher.Close()
		time.Sleep(restWatched)
		if revision := store.View().Revision(); revision != settled {
			events, _ := watcher.Next(t.Context())
			for _, event := range events {
				t.Errorf("written at rest: %s at revision %d", event.KV.Key, event.Revision)
			}
		}
	})
}

// restWatched is how long nothing may be written once there was rest.
const restWatched = 8 * time.Second

// TestListensOnItsPortAlone reads this process's listening sockets.
func TestListensOnItsPortAlone(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("reads /proc")
	}
	f := shareServer(t)
	var got []string
	for _, file := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		sockets, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer sockets.Close()
		for lines := bufio.NewScanner(sockets); lines.Scan(); {
			fields := strings.Fields(lines.Text())
			if len(fields) > 9 && fields[3] == "0A" && ownSocket(t, fields[9]) {
				got = append(got, fields[1])
			}
		}
	}
	port := f.server.Addr().(*net.TCPAddr).Port
	if want := fmt.Sprintf(":%04X", port); len(got) != 1 || !strings.HasSuffix(got[0], want) {
		t.Errorf("listening on %v, want only port %d (%s)", got, port, want)
	}
}

// ownSocket says whether the socket of this inode is open in this process.
func ownSocket(t *testing.T, inode string) bool {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if target, err := os.Readlink("/proc/self/fd/" + file.Name()); err == nil && target == "socket:["+inode+"]" {
			return true
		}
	}
	return false
}
