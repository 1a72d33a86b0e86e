"""Schemes: what clients and server share, what is averaged, and in which order."""
