"""Starts the program that builds the model of a run without its weights, and reads its answer.

That program imports torch; this module doesn't. A file that makes a library crash, or take all
memory, ends the program and not the process that waits for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from finetune_api.messages.run import RunConfig
from finetune_api.reasons import REASONS
from finetune_trainer.errors import RunError
from finetune_trainer.model_folder import Capacity
from finetune_trainer.paths import Paths

_SECONDS = 900.0  # a model of 1T parameters takes less than 60
_OF_STORES = ("AWS_", "HF_", "MLFLOW_", "WANDB_")  # keys that the program doesn't need
_CRASH = "compare the folder with the one that was published"


def check(run: RunConfig, paths: Paths, report: Callable[[str], None]) -> Capacity:
    """Builds the model as the ranks will, from config.json and the headers of its weights, and
    applies the method to it. `report` receives what was decided.

    Returns what the rows must fit into. Raises RunError for a model or a method that the ranks
    would refuse.
    """
    report("building the model without its weights")
    paths.run_config.parent.mkdir(parents=True, exist_ok=True)
    paths.run_config.write_text(run.model_dump_json(by_alias=True, exclude_none=True))
    answer = _answer(paths)
    for line in answer.get("decisions", ()):
        report(str(line))
    if "reason" in answer:
        reason = answer["reason"] if answer["reason"] in REASONS else "TrainingError"
        raise RunError(reason, str(answer["message"]))
    return Capacity(**answer["capacity"])


def _answer(paths: Paths) -> dict[str, Any]:
    command = [sys.executable, "-m", "finetune_trainer.model.check", str(paths.scratch)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_STORES)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise RunError("ModelInvalid", f"model.uri: the model isn't built after {_SECONDS:.0f} s; {_CRASH}") from None
    if ended.returncode == -signal.SIGKILL:
        raise RunError(
            "OutOfMemory",
            "model.uri: the process that builds the model without its weights was killed, probably for lack of memory; "
            "raise pods.preflightMemory of the operator",
        )
    try:
        answer = json.loads(ended.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        answer = None
    if isinstance(answer, dict):
        return answer
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        raise RunError("ModelInvalid", f"model.uri: building the model ended with {name}; {_CRASH}")
    raise RunError("TrainingError", f"the check of the model failed: {ended.stderr[-2000:]}", log_tail=ended.stderr)
