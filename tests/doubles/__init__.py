"""Small real implementations of the seams, in memory. No test patches anything: it is given one of these."""
