"""Sequence parallelism: the ranks that share a row, and how many of them a row needs."""
