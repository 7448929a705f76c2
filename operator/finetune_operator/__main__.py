"""Starts the operator: `python -m finetune_operator --config FILE`.

Arguments and environment variables are read once, here.
"""

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
    """Runs the operator and returns its exit code.

    That is 0 after a signal to stop, 1 after an unexpected error, 2 for invalid settings and 3 if
    the Lease was lost.
    """
    parser = argparse.ArgumentParser(prog="finetune_operator", description="Runs FineTuneJobs on Kubernetes.")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with the settings; without it, the defaults apply"
    )
    parser.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        help="kubeconfig of the API server; default: the pod's service account, $KUBECONFIG or ~/.kube/config",
    )
    parser.add_argument("--version", action="version", version=__version__)
    arguments = parser.parse_args()
    try:
        operator_settings = settings.load(arguments.config)
    except (ValidationError, settings.SettingsError, OSError) as error:
        print(f"{arguments.config}: {error}", file=sys.stderr)
        return 2
    logs.configure(operator_settings.log_level)
    if arguments.kubeconfig:
        os.environ["KUBECONFIG"] = str(arguments.kubeconfig)  # kopf's login reads nothing else
    return uvloop.run(app.run(operator_settings, settings.identity(os.environ), arguments.kubeconfig))


if __name__ == "__main__":
    sys.exit(main())
