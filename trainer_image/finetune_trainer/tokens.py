"""The token cache: a split's examples as memory-mapped arrays, made once a node and content, shared by its ranks.

Local rank 0 calls `build`, the others `load` after it (rank.py has the barrier between). A cache folder is complete
once it has its name. Safe to delete at any time. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainer import digests, examples, prefixes
from finetune_trainer.prefixes import Prefixes
from finetune_trainer.render import Renderer

_VERSION = 2
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
    numbers: NDArray[np.int64]  # line numbers of the file
    sources: NDArray[np.int32]  # encoder tokens of each example; 0 for a decoder-only model
    rank: NDArray[np.int64]  # see `prefixes`
    common: NDArray[np.int64]
    facts: Facts

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def label_counts(self) -> NDArray[np.int64]:
        sums = np.concatenate([[0], np.cumsum(self.learnt, dtype=np.int64)])
        return np.asarray(sums[self.offsets[1:]] - sums[self.offsets[:-1]], dtype=np.int64)

    @property
    def prefixes(self) -> Prefixes:
        return Prefixes(self.rank, self.common)

    def example(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        begin, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[begin:end], self.learnt[begin:end]


@dataclass(frozen=True)
class Facts:
    """Of the whole file."""

    key: str
    format: str
    dropped: int
    duplicates: int
    truncated: int


def key(data: Path, model: Path, **settings: Any) -> str:
    """Names a cache by everything that its content depends on."""
    whole = hashlib.sha256(json.dumps([_VERSION, settings], sort_keys=True).encode())
    for path in (data, *(model / name for name in _TOKENIZER_FILES)):
        if path.is_file():
            whole.update(f"{path.name} {digests.of_file(path)}\n".encode())
    return whole.hexdigest()[:32]


def build(
    root: Path,
    name: str,
    data: Path,
    field: str,
    *,
    format: str,
    on_invalid: str,
    renderer: Renderer,
    alive: Callable[[], None] = lambda: None,
) -> Tokens:
    """Renders a split unless the cache holds it. Raises Failed for rows that can't be used."""
    folder = root / name
    if not folder.is_dir():
        prepared = examples.prepare(data, field, format=format, on_invalid=on_invalid, renderer=renderer, alive=alive)
        _write(folder, name, prepared)
    return load(root, name)


def load(root: Path, name: str) -> Tokens:
    """Maps a complete cache into memory."""
    folder = root / name
    facts = Facts(**json.loads((folder / "facts.json").read_text()))
    arrays = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in _PARTS}
    return Tokens(**arrays, facts=facts)


_PARTS = ("ids", "learnt", "offsets", "numbers", "sources", "rank", "common")


def _write(folder: Path, name: str, prepared: examples.Examples) -> None:
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    rows = prepared.examples
    total = prepared.tokens
    arrays = {
        "ids": np.fromiter((token for row in rows for token in row.ids), np.int32, total),
        "learnt": np.fromiter((flag for row in rows for flag in row.learnt), np.bool_, total),
        "offsets": np.concatenate([[0], np.cumsum([len(row.ids) for row in rows], dtype=np.int64)]),
        "numbers": np.array([row.number for row in rows], np.int64),
        "sources": np.array([row.source for row in rows], np.int32),
    }
    arrays["rank"], arrays["common"] = prefixes.find(arrays["ids"], arrays["offsets"])
    for part, array in arrays.items():
        np.save(aside / f"{part}.npy", array)
    facts = Facts(name, prepared.format, prepared.dropped, prepared.duplicates, prepared.truncated)
    (aside / "facts.json").write_text(json.dumps(facts.__dict__))
    os.replace(aside, folder)
