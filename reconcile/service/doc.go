// Package service holds the reconcilers that say which pods are behind a Service.
//
// [EndpointSlice] lists them in slices, which everybody reads; [Endpoints] in the
// older API of one object for a Service; [EndpointSliceMirroring] copies to slices
// what users write in the older API. The kubernetes Service's own endpoints are the
// controllers, and timonel/apiserver writes them.
package service
