// Package cleanup holds the reconcilers that delete what nobody wants any more: what
// an owner left, what is in a namespace that ends, pods that have ended.
package cleanup
