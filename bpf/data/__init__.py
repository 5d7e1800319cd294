"""Data sets: the seam for plugins, the built-in sets, the resident cache, subsets and augmentation."""
