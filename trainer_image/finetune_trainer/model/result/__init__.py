"""Writes the trained weights, merges them into the base, and checks what was written."""
