"""Disturb a run at random, and compare it with one that was not."""
