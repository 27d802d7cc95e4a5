// Package policy holds the reconcilers of what a namespace allows and gives to
// those who work in it: what every namespace has, the tokens in Secrets of its
// accounts, and how many of a workload's pods may be disrupted at a time.
package policy
