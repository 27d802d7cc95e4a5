// Package s3 is a small S3-compatible store in memory, for tests: objects in
// buckets that are there from the first request, multipart uploads, listing, and
// one pair of credentials of which only the access key is checked.
package s3
