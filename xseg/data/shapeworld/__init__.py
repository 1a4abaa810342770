"""A procedural world of shapes with exact ground truth, written in the formats of real data sets."""
