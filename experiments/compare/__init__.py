"""Schemes, partitions and cuts side by side."""
