"""Recompute a recorded run, or train another back on it."""
