// Package service holds the reconcilers that say which pods are behind a Service.
package service
