package image

import "timonel/internal/fair"

const (
	// MaxPulls is how many images are pulled at a time, and maxNamespacePulls how many of
	// them for one namespace's pods: a registry may take as long as it likes for each, and
	// each takes connections, memory and disk of the node.
	MaxPulls          = 10
	maxNamespacePulls = MaxPulls / 2
)

// newSlots returns the places of pulls. Next is the namespace that has least, and of its
// pods who came first.
func newSlots() *fair.Room { return fair.New(MaxPulls, 0) }
