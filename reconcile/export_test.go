package reconcile

// Beat is how often the loop turns at least.
const Beat = beat
