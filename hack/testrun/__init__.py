"""Runs two groups of tests in parallel: those that wait for a cluster, and those that compute."""
