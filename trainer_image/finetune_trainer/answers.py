"""The answers to all prompts, spread over the ranks, and kept on disk as they come. Called by `measure` on all ranks
together.

Ranks take a batch each, then meet: rank 0 writes what is new and all agree whether to stop. So an attempt that begins
again on the same disk repeats a batch of each rank at most, and answers are found again by what they were made from:
weights, prompt and settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_trainer import generation, seeds
from finetune_trainer.diagnosis import failed_from
from finetune_trainer.generation import Answer, Batch, Speech
from finetune_trainer.learner import Learner, trained
from finetune_trainer.world import World

_VERSION = 1


@dataclass(frozen=True)
class Answering:
    """What all ranks need. `tokens`: computed at once by a rank. `stopped` is any rank's word that it was asked to end;
    `key` names what the answers are made from, without the prompts; `told` hears how many there are."""

    learner: Learner
    world: World
    speech: Speech
    tokens: int
    autocast: torch.dtype | None
    folder: Path
    key: str
    seed: int
    alive: Callable[[], None]
    told: Callable[[int], None]
    stopped: Callable[[], bool]


def answer(a: Answering, prompts: Sequence[Sequence[int]]) -> tuple[Answer, ...] | None:
    """By prompt, on every rank; None where all agreed to stop before the end."""
    names = [_name(a, prompt) for prompt in prompts]
    store = _Store(a.folder / f"{a.key}.jsonl")
    known: dict[str, Answer] = a.world.firsts(store.read() if a.world.is_first else None)
    planned = generation.batches([len(prompt) for prompt in prompts], a.speech.max_new_tokens, a.tokens)
    batches = [batch for batch in planned if any(names[index] not in known for index in batch)]
    for first in range(0, len(batches), a.world.size):
        own = batches[first : first + a.world.size]
        found = _own(a, own, prompts)
        new: dict[str, Answer] = {}
        stop = False
        for part, asked in a.world.everyones(({names[i]: said for i, said in found.items()}, a.stopped())):
            new.update(part)
            stop |= asked
        known.update(new)
        if a.world.is_first:
            store.add(new)
        a.told(sum(name in known for name in names))
        if stop and first + a.world.size < len(batches):
            return None
    return tuple(known[name] for name in names)


def weights_digest(learner: Learner, world: World) -> str:
    """Of what was trained, wherever it lies: each rank reads its own part."""
    digest = hashlib.sha256()
    for name, parameter in trained(learner.plain).items():
        part = getattr(parameter, "ds_tensor", parameter)
        part = part.to_local() if hasattr(part, "to_local") else part
        digest.update(name.encode())
        copied = part.detach().to("cpu", copy=True).contiguous()  # FSDP can't free a storage that numpy() has seen
        digest.update(copied.view(torch.uint8).numpy().tobytes())
    return hashlib.sha256("".join(world.everyones(digest.hexdigest())).encode()).hexdigest()[:32]


def _own(a: Answering, batches: list[Batch], prompts: Sequence[Sequence[int]]) -> dict[int, Answer]:
    """This rank's batch of those that are answered at the same time; a rank without one helps the others."""
    if a.world.rank < len(batches):
        return _answered(a, batches[a.world.rank], prompts)
    if a.speech.together:
        _answered(a, batches[0], prompts)
    return {}


def _answered(a: Answering, batch: Batch, prompts: Sequence[Sequence[int]]) -> dict[int, Answer]:
    try:
        said = _generate(a, batch, prompts)
    except Exception as error:
        if failed_from(error).reason != "OutOfMemory" or not a.learner.alone or len(batch) == 1:
            raise
        said = None
    if said is None:
        half = len(batch) // 2
        return {**_answered(a, batch[:half], prompts), **_answered(a, batch[half:], prompts)}
    return dict(zip(batch, said, strict=True))


def _generate(a: Answering, batch: Batch, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    model = a.learner.model
    model.eval()
    half = a.autocast
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        torch.autocast(a.world.device.type, half, enabled=half is not None),
    ):
        seed = seeds.mix(a.seed, "answers", *batch)
        said = generation.generate(a.learner.plain, [prompts[i] for i in batch], a.speech, seed=seed, alive=a.alive)
    model.train()
    return said


def _name(a: Answering, prompt: Sequence[int]) -> str:
    how = a.speech
    settings = [_VERSION, how.max_new_tokens, sorted(how.stops), how.how.model_dump(), a.seed, list(prompt)]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


class _Store:
    """Answers that are there already, a line each; a torn last line is left out. Rank 0 only."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Answer]:
        if not self._path.is_file():
            return {}
        found: dict[str, Answer] = {}
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                name, text, finished = json.loads(line)
            except ValueError:
                continue
            found[str(name)] = Answer(str(text), bool(finished))
        return found

    def add(self, answers: dict[str, Answer]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._path.is_file() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" if torn else "")
            for name, said in answers.items():
                file.write(json.dumps([name, said.text, said.finished]) + "\n")
