"""Transfer of client-side weights: over the connection, through a folder or a bucket."""
