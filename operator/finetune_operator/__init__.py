"""Runs FineTuneJobs on Kubernetes: this package is the operator."""
