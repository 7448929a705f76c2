"""Builds the manifests of a job's children."""
