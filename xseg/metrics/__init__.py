"""Mergeable metrics; numpy and hotcoco only."""
