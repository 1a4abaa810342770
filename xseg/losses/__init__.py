"""Matching, point sampling and the criterion."""
