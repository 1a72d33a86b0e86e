"""Who has which training samples."""
