"""Data sets and batches: where images come from, in which order, and how they are augmented."""
