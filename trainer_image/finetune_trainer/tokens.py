"""The token cache: a split's examples as memory-mapped arrays, made once a node and content, shared by its ranks.

Local rank 0 calls `build`, the others `load` after it (rank.py has the barrier between). A cache folder is complete
once it has its name. Safe to delete at any time. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.data_report import FileReport
from finetune_trainer import digests, examples, prefixes
from finetune_trainer.prefixes import Prefixes
from finetune_trainer.render import Renderer
from finetune_trainer.rows import Input, Problem

_VERSION = 5
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """Examples end to end. Example i is ids[offsets[i]:offsets[i+1]]."""

    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    numbers: NDArray[np.int64]  # of the records in their files, see `containers`
    origins: NDArray[np.int32]  # which of the files
    sources: NDArray[np.int32]  # encoder tokens of each example; 0 for a decoder-only model; of pairs, see `pairs`
    rank: NDArray[np.int64]  # see `prefixes`
    common: NDArray[np.int64]
    answers: NDArray[np.int64]  # learnt tokens of each example
    digests: NDArray[np.uint8]  # 16 bytes a row, of its content,
    prompts: NDArray[np.uint8]  # of all but its answer,
    folded: NDArray[np.uint8]  # and of what nearly equal rows have in common, see `alike`
    whole: NDArray[np.int64]  # tokens before it was cut
    characters: NDArray[np.int64]
    facts: Facts

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def label_counts(self) -> NDArray[np.int64]:
        return np.asarray(self.answers)

    @property
    def prefixes(self) -> Prefixes:
        return Prefixes(self.rank, self.common)

    def example(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        begin, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[begin:end], self.learnt[begin:end]


@dataclass(frozen=True)
class Facts:
    """Of all files together. `problems` are (file, number, message) of dropped rows, the first of them."""

    key: str
    format: str
    dropped: int
    unlabelled: int  # of those
    duplicates: int
    truncated: int
    files: tuple[FileReport, ...]
    problems: tuple[Problem, ...]


def key(data: Sequence[Input], model: Path, **settings: Any) -> str:
    """Names a cache by everything that its content depends on."""
    read = [[one.name, one.format, dict(one.columns), one.labels, one.sure] for one in data]
    whole = hashlib.sha256(json.dumps([_VERSION, settings, read], sort_keys=True).encode())
    for path in (*(one.path for one in data), *(model / name for name in _TOKENIZER_FILES)):
        if path.is_file():
            whole.update(f"{path.name} {digests.of_file(path)}\n".encode())
    return whole.hexdigest()[:32]


def build(
    root: Path,
    name: str,
    data: Path | Sequence[Input],
    field: str,
    *,
    on_invalid: str,
    renderer: Renderer,
    format: str = "auto",
    alive: Callable[[], None] = lambda: None,
) -> Tokens:
    """Renders a split unless the cache holds it. Raises Failed for rows that can't be used."""
    folder = root / name
    if not folder.is_dir():
        aside = root / f"{name}.{os.getpid()}.tmp"
        for left in (aside, *root.glob(f"{name}.*.tmp")):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            prepared = examples.prepare(
                data, field, format=format, on_invalid=on_invalid, renderer=renderer, alive=alive, folder=aside
            )
            _complete(aside, name, prepared, alive)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        os.replace(aside, folder)
    return load(root, name)


def load(root: Path, name: str) -> Tokens:
    """Maps a complete cache into memory."""
    folder = root / name
    told = json.loads((folder / "facts.json").read_text())
    files = tuple(FileReport.model_validate(file) for file in told.pop("files"))
    problems = tuple(Problem(*problem) for problem in told.pop("problems"))
    arrays = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in _PARTS}
    return Tokens(**arrays, facts=Facts(**told, files=files, problems=problems))


_PARTS = (*examples.COLUMNS, "rank", "common")


def _complete(folder: Path, name: str, prepared: examples.Examples, alive: Callable[[], None]) -> None:
    """What follows from all rows, beside their arrays."""
    ranks = prefixes.find(prepared.arrays["ids"], prepared.arrays["offsets"], alive=alive)
    for part, found in zip(("rank", "common"), ranks, strict=True):
        np.save(folder / f"{part}.npy", found)
    facts = {
        "key": name,
        "format": prepared.format,
        "dropped": prepared.dropped,
        "unlabelled": prepared.unlabelled,
        "duplicates": prepared.duplicates,
        "truncated": prepared.truncated,
        "files": [file.to_json() for file in prepared.files],
        "problems": [[one.number, one.message, one.file, one.unlabelled] for one in prepared.problems],
    }
    (folder / "facts.json").write_text(json.dumps(facts))
