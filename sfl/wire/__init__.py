"""Messages and conversations, without I/O."""
