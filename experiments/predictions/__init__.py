"""What a run's model takes its test set for."""
