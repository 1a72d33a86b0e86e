"""A run read from its folder, for people."""
