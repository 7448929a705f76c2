"""Builds and pushes the container images of the operator and the trainer.

It uses Docker if its engine responds, else buildah, and runs as `PYTHONPATH=hack python3 -m
images`. It uses only the standard library, since it runs before any virtual environment exists.
Only `push` writes to a registry.
"""
