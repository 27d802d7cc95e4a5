// Package policy holds the reconcilers of what a namespace allows and gives to
// those who work in it.
package policy
