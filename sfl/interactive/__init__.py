"""A run in a Python session: simulated or opened, looked at, and computed with."""
