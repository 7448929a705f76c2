"""Runs three groups of tests in parallel: two that wait for a cluster, and one that computes."""
