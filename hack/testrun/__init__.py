"""Runs groups of tests in parallel: those that wait, and those that compute."""
