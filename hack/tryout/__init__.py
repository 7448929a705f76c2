"""Implements `make try`: it fine-tunes a small model without root, containers or a cluster."""
