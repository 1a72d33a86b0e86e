"""Mutated frames, files, JSON and handshakes."""
