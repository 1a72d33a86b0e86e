"""What each cut of a model means for client and server."""
