"""Builds the operator's and the trainer's container image, with Docker where it runs, else with buildah.

Run as `PYTHONPATH=hack python3 -m images` (make images, hack/demo, hack/localcluster). Standard library only,
since it runs before any virtual environment exists. Never pushes to a registry.
"""
