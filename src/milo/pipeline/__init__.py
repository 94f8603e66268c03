"""Carrying a plan out: read, solve, write, one work item after the other."""
