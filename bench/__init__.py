"""Measurements against peers: both sides in one run, in turn, as ratios."""
