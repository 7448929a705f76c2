"""Explains why pods end, and tells the operator's own deeds from failures."""
