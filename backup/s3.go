package backup

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/spf13/pflag"
)

// S3Config is where an S3-compatible store is and how to get in.
type S3Config struct {
	// Endpoint is its URL. Default https://s3.amazonaws.com.
	Endpoint string
	// Region is the bucket's, asked of the store if empty.
	Region string
	// CredentialsFile is in the format of ~/.aws/credentials, of which the profile
	// "default" is taken. If empty, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
	// (and AWS_SESSION_TOKEN) are.
	CredentialsFile string
	// CAFile holds certificates to trust instead of the system's.
	CAFile string
}

// Flags adds a flag for each field, named prefix + endpoint and so on.
func (c *S3Config) Flags(f *pflag.FlagSet, prefix string) {
	f.StringVar(&c.Endpoint, prefix+"endpoint", "https://s3.amazonaws.com", "URL of the S3-compatible store")
	f.StringVar(&c.Region, prefix+"region", "", "region of the bucket (default: the store is asked)")
	f.StringVar(&c.CredentialsFile, prefix+"credentials", "", "file of credentials, as ~/.aws/credentials (default: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment)")
	f.StringVar(&c.CAFile, prefix+"ca", "", "file of CA certificates to trust for the store (default: the system's)")
}

// s3Store is a prefix of a bucket.
type s3Store struct {
	client         *minio.Client
	bucket, prefix string
}

// partSize is kept in memory while a snapshot is uploaded. The store's limit of
// 10,000 parts makes 160 GiB the greatest snapshot.
const partSize = 16 << 20

// ParseS3URL takes s3://bucket/key apart.
func ParseS3URL(text string) (bucket, key string, err error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "s3" || u.Host == "" || u.RawQuery != "" || u.User != nil {
		return "", "", fmt.Errorf("%q is not s3://bucket/prefix", text)
	}
	return u.Host, strings.Trim(u.Path, "/"), nil
}

// NewS3 returns the store at s3://bucket/prefix. It does not connect.
func NewS3(location string, c S3Config) (Store, error) {
	bucket, prefix, err := ParseS3URL(location)
	if err != nil {
		return nil, err
	}
	endpoint, err := url.Parse(c.Endpoint)
	if err != nil || endpoint.Host == "" || endpoint.Scheme != "http" && endpoint.Scheme != "https" || strings.Trim(endpoint.Path, "/") != "" {
		return nil, fmt.Errorf("S3 endpoint %q is not a URL such as https://s3.example.com", c.Endpoint)
	}
	creds := credentials.NewEnvAWS()
	from := "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
	if c.CredentialsFile != "" {
		creds, from = credentials.NewFileAWSCredentials(c.CredentialsFile, "default"), c.CredentialsFile
	}
	if v, err := creds.GetWithContext(nil); err != nil {
		return nil, fmt.Errorf("S3 credentials from %s: %w", from, err)
	} else if v.AccessKeyID == "" || v.SecretAccessKey == "" {
		return nil, fmt.Errorf("no S3 credentials in %s", from)
	}
	secure := endpoint.Scheme == "https"
	transport, err := minio.DefaultTransport(secure)
	if err != nil {
		return nil, err
	}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, err
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate", c.CAFile)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	client, err := minio.New(endpoint.Host, &minio.Options{Creds: creds, Secure: secure, Region: c.Region, Transport: transport, MaxRetries: 3})
	if err != nil {
		return nil, fmt.Errorf("S3 store %s: %w", c.Endpoint, err)
	}
	return &s3Store{client: client, bucket: bucket, prefix: prefix}, nil
}

// OpenS3 opens the object at s3://bucket/key.
func OpenS3(ctx context.Context, location string, c S3Config) (io.ReadCloser, error) {
	dir, name := path.Split(strings.TrimRight(location, "/"))
	if name == "" || strings.HasSuffix(dir, "://") {
		return nil, fmt.Errorf("%q does not name an object: s3://bucket/key", location)
	}
	store, err := NewS3(dir, c)
	if err != nil {
		return nil, err
	}
	return store.Open(ctx, name)
}

func (s *s3Store) String() string { return "s3://" + path.Join(s.bucket, s.prefix) }

func (s *s3Store) key(name string) string { return path.Join(s.prefix, name) }

// List implements Store.
func (s *s3Store) List(ctx context.Context) ([]Item, error) {
	prefix := s.prefix
	if prefix != "" {
		prefix += "/"
	}
	var items []Item
	for object := range s.client.ListObjectsIter(ctx, s.bucket, minio.ListObjectsOptions{Prefix: prefix}) {
		if object.Err != nil {
			return nil, s.explain(object.Err)
		}
		if item, ok := parseName(strings.TrimPrefix(object.Key, prefix)); ok {
			item.Size = object.Size
			items = append(items, item)
		}
	}
	return items, nil
}

// Put implements Store: an object appears when all its parts have arrived.
func (s *s3Store) Put(ctx context.Context, name string, write func(io.Writer) error) error {
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		w.CloseWithError(write(w))
	}()
	_, err := s.client.PutObject(ctx, s.bucket, s.key(name), r, -1, minio.PutObjectOptions{PartSize: partSize, ContentType: "application/octet-stream"})
	r.CloseWithError(errors.New("the upload ended"))
	<-written
	return s.explain(err)
}

// Open implements Store.
func (s *s3Store) Open(ctx context.Context, name string) (io.ReadCloser, error) {
	object, err := s.client.GetObject(ctx, s.bucket, s.key(name), minio.GetObjectOptions{})
	if err != nil {
		return nil, s.explain(err)
	}
	if _, err := object.Stat(); err != nil { // GetObject itself asks nothing
		object.Close()
		return nil, fmt.Errorf("s3://%s: %w", path.Join(s.bucket, s.key(name)), s.explain(err))
	}
	return object, nil
}

// Delete implements Store.
func (s *s3Store) Delete(ctx context.Context, name string) error {
	return s.explain(s.client.RemoveObject(ctx, s.bucket, s.key(name), minio.RemoveObjectOptions{}))
}

// explain adds the store's code, where it is not in the message.
func (s *s3Store) explain(err error) error {
	var answer minio.ErrorResponse
	if errors.As(err, &answer) && answer.Code != "" && answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %w", answer.Code, err)
	}
	return err
}
