"""A cohort from its first batch to its last epoch: the loop, its data, its checkpoint, its hardware."""
