"""Attack a running server."""
