"""Messages and how a conversation is held; no input or output of its own."""
