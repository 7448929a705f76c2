"""Implements `make demo`: a throw-away cluster, the operator, a job and its results."""
