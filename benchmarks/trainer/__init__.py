"""The trainer beside its peers: same machine, model, rows and loss, one command, one table.

    .venv/bin/python benchmarks/trainer            (or `make bench-trainer`; --help says what can be chosen)

Nothing here is imported by the operator or the trainer. `flops`, `search`, `table`, `plot` and `texts` are pure;
`ours`, `peers`, `roof` and `extras` start processes and measure; `run_*.py` run inside the peers' environments.
"""
