"""The operator's door: `python -m finetune_operator --config FILE`. Reads arguments and environment, once."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import uvloop
from pydantic import ValidationError

from finetune_api import __version__
from finetune_operator import app, logs, settings


def main() -> int:
    """Returns the exit code: 0 asked to stop, 1 a surprise, 2 wrong settings, 3 the lease was lost."""
    parser = argparse.ArgumentParser(prog="finetune_operator", description="Runs FineTuneJobs on Kubernetes.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, YAML; without it the defaults")
    parser.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        help="how to reach the API server; without it the pod's service account, $KUBECONFIG or ~/.kube/config",
    )
    parser.add_argument("--version", action="version", version=__version__)
    arguments = parser.parse_args()
    try:
        chosen = settings.load(arguments.config)
    except (ValidationError, OSError) as error:
        print(f"{arguments.config}: {error}", file=sys.stderr)
        return 2
    logs.configure(chosen.log_level)
    if arguments.kubeconfig:
        os.environ["KUBECONFIG"] = str(arguments.kubeconfig)  # kopf's login reads nothing else
    return uvloop.run(app.run(chosen, settings.identity(os.environ), arguments.kubeconfig))


if __name__ == "__main__":
    sys.exit(main())
