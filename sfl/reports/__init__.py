"""Recorded runs, read from their folders and shown to people."""
