"""A procedural world with exact ground truth, written in the formats of the real data sets."""
