"""One annotation format per file, each read into Sample."""
