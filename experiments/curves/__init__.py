"""A run's curves."""
