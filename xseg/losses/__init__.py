"""Training losses: points to compare masks at, Hungarian matching, and the criterion."""
