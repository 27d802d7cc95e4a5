package sched

import (
	"hash/fnv"
	"math/rand/v2"
)

// keepEqual is how many kinds of pods a round remembers answers for.
const keepEqual = 16

// answers are what nodes said to a kind of pods: of equal pods, whose outcome on a node
// depends on that node alone. An answer holds until something comes to the node, is to
// leave it or is nominated there.
type answers struct {
	fits    []fitAnswer
	victims []victimAnswer
	// offset is where in the list of nodes the search for victims begins.
	offset uint64
}

// An answer that was given has the node's version plus one.
type fitAnswer struct {
	version uint32
	status  *status
}

type victimAnswer struct {
	version uint32
	victims *nodeVictims
	status  *status
}

// changed says that what nodes answered before does not hold for this one.
func (r *round) changed(slot int32) { r.versions[slot]++ }

// remembers makes the round remember what nodes say to pods equal to the candidate, if
// that can be.
func (r *round) remembers(c *candidate, signature string) {
	if c.answers != nil || signature == "" || !c.plain() {
		return
	}
	if len(r.equal) >= keepEqual {
		clear(r.equal)
	}
	h := fnv.New64a()
	h.Write([]byte(signature))
	c.answers = &answers{
		fits: make([]fitAnswer, len(r.nodes)), victims: make([]victimAnswer, len(r.nodes)),
		offset: rand.New(rand.NewPCG(r.in.Seed, h.Sum64())).Uint64(),
	}
	r.equal[signature] = c.answers
	for _, slot := range r.cluster.order {
		if s := r.statuses[slot]; s != nil && s.err == nil {
			c.answers.fits[slot] = fitAnswer{r.versions[slot] + 1, s}
		}
	}
}

// plain says that what a node answers depends on that node alone.
func (c *candidate) plain() bool {
	return c.spread == nil && c.affinity == nil && c.volumes == nil && c.claims == nil
}

// fit is what filter says, or said before and would say again.
func (r *round) fit(c *candidate, slot int32) *status {
	if c.answers == nil {
		return r.filter(c, r.nodes[slot])
	}
	a := &c.answers.fits[slot]
	if a.version != r.versions[slot]+1 {
		s := r.filter(c, r.nodes[slot])
		if s != nil && s.err != nil {
			return s
		}
		*a = fitAnswer{r.versions[slot] + 1, s}
	}
	return a.status
}

// victims is what victimsOn says, or said before and would say again.
func (r *round) victims(c *candidate, slot int32) (*nodeVictims, *status) {
	if c.answers == nil {
		return r.victimsOn(c, slot)
	}
	a := &c.answers.victims[slot]
	if a.version != r.versions[slot]+1 {
		v, s := r.victimsOn(c, slot)
		*a = victimAnswer{r.versions[slot] + 1, v, s}
	}
	return a.victims, a.status
}
