package s3

import (
	"bufio"
	"bytes"
	"crypto/md5"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Server is an http.Handler. Its fields may be set before it serves.
type Server struct {
	// AccessKey is the only one let in.
	AccessKey string

	mu      sync.Mutex
	objects map[string]object // by bucket/key
	uploads map[string]map[int][]byte
	failing error
	next    int
}

type object struct {
	data []byte
	at   time.Time
}

// Fail makes every request that writes fail with an internal error, until it is
// called with nil.
func (s *Server) Fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failing = err
}

// Keys returns bucket/key of every object, in order.
func (s *Server) Keys() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.objects))
}

// Uploads is how many multipart uploads are unfinished.
func (s *Server) Uploads() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.uploads)
}

// Change replaces an object's data by what f returns.
func (s *Server) Change(path string, f func([]byte) []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.objects == nil {
		s.objects = map[string]object{}
	}
	s.objects[path] = object{f(bytes.Clone(s.objects[path].data)), time.Now()}
}

func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, "%s<Error><Code>%s</Code><Message>%s</Message></Error>", xml.Header, code, message)
}

func answer(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/xml")
	io.WriteString(w, xml.Header)
	xml.NewEncoder(w).Encode(value)
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.objects == nil {
		s.objects = map[string]object{}
	}
	if s.uploads == nil {
		s.uploads = map[string]map[int][]byte{}
	}
	if !strings.Contains(r.Header.Get("Authorization"), "Credential="+s.AccessKey+"/") {
		refuse(w, http.StatusForbidden, "InvalidAccessKeyId", "The access key does not exist.")
		return
	}
	path := strings.TrimPrefix(r.URL.Path, "/")
	bucket, key, _ := strings.Cut(path, "/")
	query := r.URL.Query()
	if s.failing != nil && (r.Method == http.MethodPut || r.Method == http.MethodPost) {
		io.Copy(io.Discard, r.Body)
		refuse(w, http.StatusInternalServerError, "InternalError", s.failing.Error())
		return
	}
	switch {
	case key == "" && query.Has("location"):
		answer(w, struct {
			XMLName xml.Name `xml:"LocationConstraint"`
		}{})
	case key == "" && r.Method == http.MethodGet:
		s.list(w, bucket, query.Get("prefix"))
	case r.Method == http.MethodPost && query.Has("uploads"):
		s.next++
		id := strconv.Itoa(s.next)
		s.uploads[id] = map[int][]byte{}
		answer(w, struct {
			XMLName  xml.Name `xml:"InitiateMultipartUploadResult"`
			Bucket   string
			Key      string
			UploadId string
		}{Bucket: bucket, Key: key, UploadId: id})
	case query.Has("uploadId"):
		s.upload(w, r, path, query.Get("uploadId"), query.Get("partNumber"))
	case r.Method == http.MethodPut:
		data, err := body(r)
		if err != nil {
			refuse(w, http.StatusBadRequest, "IncompleteBody", err.Error())
			return
		}
		s.objects[path] = object{data, time.Now()}
		w.Header().Set("ETag", etag(data))
	case r.Method == http.MethodDelete:
		delete(s.objects, path)
		w.WriteHeader(http.StatusNoContent)
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		o, ok := s.objects[path]
		if !ok {
			refuse(w, http.StatusNotFound, "NoSuchKey", "The specified key does not exist.")
			return
		}
		w.Header().Set("ETag", etag(o.data))
		http.ServeContent(w, r, "", o.at, bytes.NewReader(o.data))
	default:
		refuse(w, http.StatusNotImplemented, "NotImplemented", r.Method)
	}
}

func (s *Server) upload(w http.ResponseWriter, r *http.Request, path, id, part string) {
	parts, ok := s.uploads[id]
	if !ok {
		refuse(w, http.StatusNotFound, "NoSuchUpload", "The specified upload does not exist.")
		return
	}
	switch r.Method {
	case http.MethodPut:
		data, err := body(r)
		number, _ := strconv.Atoi(part)
		if err != nil || number < 1 {
			refuse(w, http.StatusBadRequest, "IncompleteBody", fmt.Sprint(err))
			return
		}
		parts[number] = data
		w.Header().Set("ETag", etag(data))
	case http.MethodPost:
		var whole []byte
		for _, number := range slices.Sorted(maps.Keys(parts)) {
			whole = append(whole, parts[number]...)
		}
		delete(s.uploads, id)
		s.objects[path] = object{whole, time.Now()}
		bucket, key, _ := strings.Cut(path, "/")
		answer(w, struct {
			XMLName xml.Name `xml:"CompleteMultipartUploadResult"`
			Bucket  string
			Key     string
			ETag    string
		}{Bucket: bucket, Key: key, ETag: etag(whole)})
	case http.MethodDelete:
		delete(s.uploads, id)
		w.WriteHeader(http.StatusNoContent)
	}
}

func (s *Server) list(w http.ResponseWriter, bucket, prefix string) {
	type contents struct {
		Key          string
		LastModified string
		ETag         string
		Size         int
	}
	result := struct {
		XMLName     xml.Name `xml:"ListBucketResult"`
		Name        string
		Prefix      string
		KeyCount    int
		IsTruncated bool
		Contents    []contents
	}{Name: bucket, Prefix: prefix}
	for _, path := range slices.Sorted(maps.Keys(s.objects)) {
		if key, ok := strings.CutPrefix(path, bucket+"/"); ok && strings.HasPrefix(key, prefix) {
			o := s.objects[path]
			result.Contents = append(result.Contents, contents{key, o.at.UTC().Format(time.RFC3339), etag(o.data), len(o.data)})
		}
	}
	result.KeyCount = len(result.Contents)
	answer(w, result)
}

func etag(data []byte) string {
	sum := md5.Sum(data)
	return `"` + hex.EncodeToString(sum[:]) + `"`
}

// body reads a request's body, also one in signed chunks: each a length in hex,
// ";chunk-signature=…", its data; after the last one, of no length, trailers.
func body(r *http.Request) ([]byte, error) {
	if !strings.HasPrefix(r.Header.Get("X-Amz-Content-Sha256"), "STREAMING-") {
		return io.ReadAll(r.Body)
	}
	var data []byte
	in := bufio.NewReader(r.Body)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return nil, fmt.Errorf("chunk: %w", err)
		}
		length, _, _ := strings.Cut(strings.TrimSpace(line), ";")
		n, err := strconv.ParseUint(length, 16, 31)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			_, err := io.Copy(io.Discard, in)
			return data, err
		}
		chunk := make([]byte, n+2)
		if _, err := io.ReadFull(in, chunk); err != nil {
			return nil, err
		}
		if string(chunk[n:]) != "\r\n" {
			return nil, errors.New("a chunk that does not end")
		}
		data = append(data, chunk[:n]...)
	}
}
