"""Data sets: images with their labels, as they lie on a disk."""
