"""Generates answers to all prompts, distributed over the ranks and saved on disk as they arrive.

Each rank generates a batch; then the ranks exchange their answers, rank 0 saves the new ones, and
all ranks agree whether to stop. A later attempt on the same disk therefore repeats at most one
batch of each rank. A saved answer is identified by what it was generated from: weights, prompt and
settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_trainer import seeds
from finetune_trainer.errors import run_error_from
from finetune_trainer.evaluation import generation
from finetune_trainer.evaluation.generation import Answer, Batch, GenerationSettings
from finetune_trainer.parallel.strategy import ParallelStrategy, trained
from finetune_trainer.parallel.world import World

_VERSION = 1


@dataclass(frozen=True)
class AnswerJob:
    """Holds what all ranks need in order to generate answers.

    A rank computes at most `tokens` tokens at a time. `key` identifies what the answers are
    generated from, except for the prompts. `on_progress` receives the number of answers so far.
    `should_stop` returns whether this rank was asked to stop.
    """

    strategy: ParallelStrategy
    world: World
    settings: GenerationSettings
    tokens: int
    folder: Path
    key: str
    seed: int
    heartbeat: Callable[[], None]
    on_progress: Callable[[int], None]
    should_stop: Callable[[], bool]


def answer(job: AnswerJob, prompts: Sequence[Sequence[int]]) -> tuple[Answer, ...] | None:
    """Generates an answer to each prompt, with the full model on every rank.

    Returns the answers in the order of the prompts on every rank, or None if all ranks agreed to
    stop early.
    """
    names = [_name(job, prompt) for prompt in prompts]
    cache = _AnswerCache(job.folder / f"{job.key}.jsonl")
    known: dict[str, Answer] = job.world.broadcast(cache.read() if job.world.is_first else {}, dict[str, Answer])
    planned = generation.batches([len(prompt) for prompt in prompts], job.settings.max_new_tokens, job.tokens)
    batches = [batch for batch in planned if any(names[index] not in known for index in batch)]
    with job.strategy.gathered() if batches else nullcontext():
        complete = _answer_all(job, prompts, batches, names, known, cache)
    return tuple(known[name] for name in names) if complete else None


def _answer_all(
    job: AnswerJob,
    prompts: Sequence[Sequence[int]],
    batches: list[Batch],
    names: list[str],
    known: dict[str, Answer],
    cache: _AnswerCache,
) -> bool:
    """Adds the answers of all batches to `known`. Returns False if all ranks agreed to stop
    early."""
    for first in range(0, len(batches), job.world.size):
        own = _answer_own_batch(job, batches[first : first + job.world.size], prompts)
        own_by_name = {names[index]: generated for index, generated in own.items()}
        new: dict[str, Answer] = {}
        stop = False
        message = (own_by_name, job.should_stop())
        for answers, stop_requested in job.world.all_gather(message, tuple[dict[str, Answer], bool]):
            new.update(answers)
            stop |= stop_requested
        known.update(new)
        if job.world.is_first:
            cache.add(new)
        job.on_progress(sum(name in known for name in names))
        if stop and first + job.world.size < len(batches):
            return False
    return True


def weights_digest(strategy: ParallelStrategy, world: World) -> str:
    """Returns a digest of the trained weights that is the same on every rank. Each rank reads only
    its own part."""
    digest = hashlib.sha256()
    for name, parameter in trained(strategy.unwrapped).items():
        part = getattr(parameter, "ds_tensor", parameter)
        part = part.to_local() if hasattr(part, "to_local") else part
        digest.update(name.encode())
        # This is a copy, since FSDP can't free a storage of which numpy() has made a view.
        copied = part.detach().to("cpu", copy=True).contiguous()
        digest.update(copied.view(torch.uint8).numpy().tobytes())
    return hashlib.sha256("".join(world.all_gather(digest.hexdigest(), str)).encode()).hexdigest()[:32]


def _answer_own_batch(job: AnswerJob, batches: list[Batch], prompts: Sequence[Sequence[int]]) -> dict[int, Answer]:
    """Answers this rank's batch among those that are answered at the same time, if it has one."""
    if job.world.rank < len(batches):
        return _answer_batch(job, batches[job.world.rank], prompts)
    return {}


def _answer_batch(job: AnswerJob, batch: Batch, prompts: Sequence[Sequence[int]]) -> dict[int, Answer]:
    """Answers a batch. It is halved if memory runs out."""
    try:
        answers = _generate(job, batch, prompts)
    except Exception as error:
        if run_error_from(error).reason != "OutOfMemory" or len(batch) == 1:
            raise
        answers = None
    if answers is None:  # outside of the except clause, whose traceback keeps tensors alive
        half = len(batch) // 2
        return {**_answer_batch(job, batch[:half], prompts), **_answer_batch(job, batch[half:], prompts)}
    return dict(zip(batch, answers, strict=True))


def _generate(job: AnswerJob, batch: Batch, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    model = job.strategy.model
    model.eval()
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        job.strategy.autocast(job.strategy.unwrapped),
    ):
        answers = generation.generate(
            job.strategy.unwrapped,
            [prompts[index] for index in batch],
            job.settings,
            seed=seeds.mix(job.seed, "answers", *batch),
            heartbeat=job.heartbeat,
        )
    model.train()
    return answers


def _name(job: AnswerJob, prompt: Sequence[int]) -> str:
    """Returns a digest of what an answer depends on, except for what `job.key` identifies."""
    settings = job.settings
    values = [
        _VERSION,
        settings.max_new_tokens,
        sorted(settings.stop_tokens),
        settings.spec.model_dump(),
        job.seed,
        list(prompt),
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


class _AnswerCache:
    """Stores answers on disk, one per line. Invalid lines, such as a torn last line, are skipped.
    Only rank 0 uses it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Answer]:
        if not self._path.is_file():
            return {}
        answers: dict[str, Answer] = {}
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                name, text, finished = json.loads(line)
            except ValueError:
                continue
            answers[str(name)] = Answer(str(text), bool(finished))
        return answers

    def add(self, answers: dict[str, Answer]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._path.is_file() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" if torn else "")
            for name, answer in answers.items():
                file.write(json.dumps([name, answer.text, answer.finished]) + "\n")
