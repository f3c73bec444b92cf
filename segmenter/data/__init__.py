"""Data sets: pictures with their labels, as they lie on a disk."""
