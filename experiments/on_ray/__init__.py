"""A run whose server and clients are placed, watched and started again by Ray."""
