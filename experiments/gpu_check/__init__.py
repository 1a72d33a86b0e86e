"""Whether a GPU gives the same results as it should, and how fast a step is there."""
