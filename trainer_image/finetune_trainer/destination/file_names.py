"""Tells by their names the files that a job writes beside its result. Files of other names in the
same folders belong to somebody else. The module is pure."""

from __future__ import annotations

import re

from finetune_api.names import (
    CHECKPOINT_HISTORY,
    CHECKPOINT_MANIFEST,
    CHECKPOINT_STATE,
    CHECKPOINTS_DIR,
    DATA_REPORT_PATH,
    EVALUATION_PATH,
    HISTORY_PATH,
    REPORT_PATH,
    SAMPLES_PATH,
    TENSORBOARD_DIR,
    WANDB_DIR,
)
from finetune_trainer.destination import token_store
from finetune_trainer.manifest import INDEX
from finetune_trainer.paths import split_checkpoint_path

_PART = re.compile(r"(.*/)?\.([^/]+)\.[0-9a-f]{8}\.part")  # a file that was being written to a claim
_OF_CHECKPOINT = re.compile(
    rf"[^/]+\.safetensors|node-\d+-attempt-\d+\.json|{re.escape(INDEX)}|{re.escape(CHECKPOINT_HISTORY)}"
    rf"|{re.escape(CHECKPOINT_MANIFEST)}|{re.escape(CHECKPOINT_STATE)}"
)
_RECORD = re.compile(rf"{CHECKPOINTS_DIR}/(memory|scarce-memory-\d+)\.json")
_REPORTS = frozenset({HISTORY_PATH, DATA_REPORT_PATH, SAMPLES_PATH, EVALUATION_PATH, REPORT_PATH})
_REPORT_FOLDERS = (f"{TENSORBOARD_DIR}/", f"{WANDB_DIR}/")


def step_of(path: str) -> int | None:
    """Returns the step of the checkpoint that a file is a part of; None for any other file."""
    step, name = split_checkpoint_path(_complete(path)) or (None, "")
    return step if _OF_CHECKPOINT.fullmatch(name) else None


def is_record(path: str) -> bool:
    """Whether a file tells the next attempt how much memory there was."""
    return _RECORD.fullmatch(_complete(path)) is not None


def is_of_tokens(path: str) -> bool:
    """Whether a file is one of the tokens that a preflight has stored."""
    return path.startswith(f"{token_store.FOLDER}/")


def is_report(path: str) -> bool:
    """Whether a file of the result's own folder is there before the result is, or without one."""
    complete = _complete(path)
    return complete in _REPORTS or complete.startswith(_REPORT_FOLDERS)


def _complete(path: str) -> str:
    """Returns the path that a file would have got once it was written."""
    part = _PART.fullmatch(path)
    return f"{part[1] or ''}{part[2]}" if part else path
