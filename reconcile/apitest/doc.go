// Package apitest runs the standard reconcilers against the real API server, on
// a state in memory, with agents that only pretend.
package apitest
