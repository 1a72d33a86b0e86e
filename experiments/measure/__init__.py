"""Measurements that are rarely made again."""
