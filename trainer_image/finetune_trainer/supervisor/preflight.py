"""Checks the output, the model and the data before hardware is allocated.

`python -m finetune_trainer preflight` runs all of them in a pod without a GPU. The supervisor runs
the cheap ones again before it starts the ranks. None of them loads the model's weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from finetune_api.amounts import FEW_CORES
from finetune_api.messages.result import Result
from finetune_api.messages.run import RunConfig
from finetune_trainer.destination import output_check, predecessor, token_store
from finetune_trainer.destination.output_check import Destination, Role
from finetune_trainer.destination.signing import Signer, Trust
from finetune_trainer.destination.token_store import Origin
from finetune_trainer.errors import RunError
from finetune_trainer.model.check import process as model_check
from finetune_trainer.paths import Paths
from finetune_trainer.storage.base import Storage
from finetune_trainer.storage.schemes import Access, open_folder
from finetune_trainer.supervisor import download
from finetune_trainer.supervisor.download import ModelFacts, Report
from finetune_trainer.supervisor.inspection.parent import Inspection
from finetune_trainer.supervisor.signals import in_thread

_RELEASE_SECONDS = 20.0  # at the deadline
_TICK_SECONDS = 0.1


class Activity:
    """Keeps what a preflight is doing, for the message of its deadline."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._sentence = "it began"

    def report(self, sentence: str) -> None:
        """Receives a sentence for the log, about what begins now."""
        self._sentence = sentence
        self._report(sentence)

    def reading(self, subject: str) -> None:
        """Receives the name of what is read from now on."""
        self._sentence = f"reading {subject}"

    def __str__(self) -> str:
        return self._sentence


def check_in_time(
    run: RunConfig,
    paths: Paths,
    access: Access,
    report: Report,
    waiting: Callable[[], None] = lambda: None,
    tick: float = _TICK_SECONDS,
) -> Result:
    """Runs all checks in a thread, so that signals are handled meanwhile, and until the deadline.

    Meanwhile `waiting` is called every `tick` seconds; it may raise to abandon the checks.

    Raises RunError as `check` does, and RunError(PreflightTimeout) with what took so long.
    """
    activity = Activity(report)
    deadline = time.monotonic() + run.preflight_seconds

    def wait() -> None:
        """Raises RunError at the deadline."""
        waiting()
        if time.monotonic() < deadline:
            return
        transfers = str(access.transfers)
        raise RunError(
            "PreflightTimeout",
            f"runPolicy.preflightSeconds: the checks didn't end within {run.preflight_seconds} s; the last one: "
            f"{activity}{transfers and f'; still downloading {transfers}'}",
        )

    try:
        return in_thread(lambda: check(run, paths, access, activity), wait, tick)
    except RunError as error:
        if error.reason == "PreflightTimeout":
            give_back(run, access, _RELEASE_SECONDS)
        raise


def give_back(run: RunConfig, access: Access, seconds: float) -> None:
    """Releases the output if the job has stored nothing there; a store that doesn't answer isn't
    waited for longer than this."""
    limit = time.monotonic() + seconds

    def wait() -> None:
        """Raises TimeoutError when the time is up."""
        if time.monotonic() > limit:
            raise TimeoutError

    with suppress(RunError, TimeoutError):
        in_thread(
            lambda: predecessor.release_if_empty(open_folder(run.output, "output", access), run.job),
            wait,
            _TICK_SECONDS,
        )


def check(run: RunConfig, paths: Paths, access: Access, activity: Activity) -> Result:
    """Runs all checks; `activity` receives what they do.

    Raises RunError with the field, the value and the remedy.
    """
    report = activity.report
    report(f"checking the output {run.output.display}")
    storage, destination = check_destination(run, access, Role("preflight"))
    if destination.finished is not None and Trust(run.signers).believes(destination.finished[0]):
        return Result(outcome="succeeded", message="the output already holds this job's result")
    try:
        return _check_inputs(run, paths, access, storage, activity)
    except RunError:
        with suppress(RunError):
            predecessor.release_if_empty(storage, run.job)
        raise


def _check_inputs(run: RunConfig, paths: Paths, access: Access, storage: Storage, activity: Activity) -> Result:
    report = activity.report
    model = download.model(run, paths, access, report, weights=False)
    data_files = download.data(run, paths, access, report)
    check_room(run, model, sum(facts.bytes for facts in data_files.values()))
    if run.world.device == "cuda" and run.world.threads_per_process < FEW_CORES:
        report(
            f"resources.cpu: {run.world.threads_per_process} cores for each GPU are few, so that the GPUs may wait for "
            f"the CPU; use at least {FEW_CORES}, or auto"
        )
    capacity = model_check.check(run, paths, report)
    counts, data = Inspection(run, paths, access.environment, report, reading=activity.reading).tokens(capacity)
    signer, origin = Signer(), Origin(run.job.uid, run.token_signers)
    stored = [token_store.upload(storage, folder, origin, signer, report) for folder in _token_folders(run, paths)]
    return Result(
        outcome="succeeded",
        message=counts,
        model=model.status(complete=False),
        data=data,
        signer=signer.public if any(stored) else None,
    )


def fetch_tokens(run: RunConfig, paths: Paths, storage: Storage, report: Report) -> None:
    """Downloads the tokens that a preflight has stored. It needs the rows and the tokenizer."""
    if run.world.device == "cuda" and storage.list(token_store.FOLDER):
        for folder in _token_folders(run, paths):
            token_store.download(storage, folder, Origin(run.job.uid, run.token_signers), report)


def _token_folders(run: RunConfig, paths: Paths) -> list[Path]:
    """Returns the folders of the tokens of all splits, whether they exist or not."""
    from finetune_trainer.data import pipeline

    inputs = pipeline.Inputs.of_run(run, paths)
    return [inputs.cache / name for name in dict.fromkeys(inputs.cache_names.values())]


def check_room(run: RunConfig, model: ModelFacts, data_bytes: int) -> None:
    """Checks that the model, the rows and the result fit on the scratch disk, and the model into
    memory.

    Only what every run needs is counted. If resources.scratch or resources.memory is auto, the
    operator raises it once the size of the model is known. Raises RunError InvalidConfig.
    """
    copies = (1 if model.on_scratch else 0) + (1 if run.merge or run.method == "full" else 0)
    needed = copies * model.total_bytes + data_bytes
    if run.scratch_bytes is not None and not run.auto_scratch and needed > run.scratch_bytes:
        raise RunError(
            "InvalidConfig",
            f"resources.scratch is {_gib(run.scratch_bytes)}, but the model, the rows and the result need "
            f"{_gib(needed)} of it; raise it, and add room for checkpoints, or use auto",
        )
    # A base whose files are in float32 is loaded in half of that, and a quantized one in less.
    least = model.total_bytes // 2
    loads_all = run.world.device == "cuda" and run.model.quantization == "none"
    if loads_all and run.memory_bytes is not None and not run.auto_memory and least > run.memory_bytes:
        raise RunError(
            "InvalidConfig",
            f"resources.memory is {_gib(run.memory_bytes)}, but loading the model takes at least {_gib(least)} of it; "
            "raise it, or use auto",
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def check_destination(run: RunConfig, access: Access, role: Role) -> tuple[Storage, Destination]:
    """Claims the output for this job and, unless the pod follows node 0, checks that it can be
    written.

    Raises RunError for an output of another job, or one that can't be reached.
    """
    storage = open_folder(run.output, "output", access)
    destination = output_check.take(storage, run, role)
    if role.kind != "follows" and destination.finished is None:
        output_check.probe(storage, run.job)
    return storage, destination
