"""The directory of an experiment and its settings over time: grids, their extension, provenance, hand-over, upkeep."""
