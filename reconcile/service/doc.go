// Package service holds the reconcilers that say which pods are behind a Service, and
// which addresses one of type LoadBalancer has.
//
// [EndpointSlice] lists them in slices, which everybody reads; [Endpoints] in the
// older API of one object for a Service; [EndpointSliceMirroring] copies to slices
// what users write in the older API. The kubernetes Service's own endpoints are the
// controllers, and timonel/apiserver writes them.
//
// [LoadBalancer] gives Services addresses from the pools in a ConfigMap. [AddressHolder]
// says, in a Lease of each address, which node announces it; timonel/network/address does.
package service
