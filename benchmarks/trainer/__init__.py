"""Compares the trainer with its peers on the same machine, model, rows and loss, in one table.

    .venv/bin/python benchmarks/trainer            (or `make bench-trainer`; --help lists options)

Nothing here is imported by the operator or the trainer. `flops`, `search`, `table`, `plot` and
`texts` are pure; `ours`, `peers`, `roof` and `extras` start processes and measure; `run_*.py` run
inside the peers' environments.
"""
