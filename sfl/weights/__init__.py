"""How client-side weights travel: over the connection, through a folder or a bucket."""
