"""Writes docs/sizing.md: which GPUs, memory and scratch disk well-known models need.

`make sizing` runs it. The figures are those of the trainer's own memory estimate; no model is
loaded.
"""
