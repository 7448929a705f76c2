"""Stores the examples of a split in the token cache, as memory-mapped arrays.

A node makes a cache once for its content, and all ranks of the node share it: the first rank calls
`build`, and the others call `load` once it is done. A folder gets its final name only when it is
complete. The cache may be deleted at any time. The module doesn't import torch.
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

from finetune_api.messages.data_report import FileReport, Finding
from finetune_trainer import manifest
from finetune_trainer.data import preparation, shared_prefixes
from finetune_trainer.data.preparation import ReadOptions
from finetune_trainer.data.reading.row import Problem
from finetune_trainer.data.reading.rows import InputFile
from finetune_trainer.data.shared_prefixes import SharedPrefixes

_VERSION = 8
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """Holds all examples end to end. Example i is ids[offsets[i]:offsets[i+1]].

    `ids` and `loss_mask` have one entry per token, `offsets` has one more than there are examples,
    `common` belongs to the order by content, and all others have one entry per example.
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    line_numbers: NDArray[np.int64]  # of the records in their files, see `records`
    file_index: NDArray[np.int32]
    sources: NDArray[np.int32]  # encoder tokens; 0 for a decoder-only model; for pairs see `example`
    rank: NDArray[np.int64]  # the position in the order by content, see `shared_prefixes`
    common: NDArray[np.int64]
    label_counts: NDArray[np.int64]  # tokens that count in the loss
    digests: NDArray[np.uint8]  # (examples, 16), of the content of a row
    prompts: NDArray[np.uint8]  # (examples, 16), of a row without its answer
    near_duplicate_digests: NDArray[np.uint8]  # (examples, 16), see `dedup`
    uncut_lengths: NDArray[np.int64]  # tokens before truncation
    characters: NDArray[np.int64]
    earlier: NDArray[np.bool_]  # whether another example of the same row follows
    facts: Facts

    def __len__(self) -> int:
        return len(self.line_numbers)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The length of each example in tokens."""
        return np.diff(self.offsets)

    @property
    def prefixes(self) -> SharedPrefixes:
        """What examples have in common at their beginning."""
        return SharedPrefixes(self.rank, self.common)

    def example(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return (ids, loss_mask) of an example."""
        begin, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[begin:end], self.loss_mask[begin:end]


@dataclass(frozen=True)
class Facts:
    """Holds figures for all files together. `problems` are the first problems of dropped rows."""

    key: str
    format: str
    dropped: int
    unlabelled: int  # of the dropped rows
    duplicates: int
    truncated: int
    files: tuple[FileReport, ...]
    problems: tuple[Problem, ...]
    findings: tuple[Finding, ...]


def key(data: Sequence[InputFile], model: Path, **settings: Any) -> str:
    """Return the name of a cache, which depends on everything that determines its content.

    `settings` are the settings of the job that change how a row is rendered.
    """
    files = [[file.name, file.format, dict(file.columns), file.labels, file.min_label_probability] for file in data]
    digest = hashlib.sha256(json.dumps([_VERSION, settings, files], sort_keys=True).encode())
    for path in (*(file.path for file in data), *(model / name for name in _TOKENIZER_FILES)):
        if path.is_file():
            digest.update(f"{path.name} {manifest.of_file(path)}\n".encode())
    return digest.hexdigest()[:32]


def build(root: Path, name: str, data: Path | Sequence[InputFile], options: ReadOptions) -> Tokens:
    """Render a split unless the cache has it already, and load it. `options` must have a renderer.

    Raises RunError for rows that can't be used.
    """
    folder = root / name
    if not all((folder / f"{part}.npy").is_file() for part in _PARTS):
        shutil.rmtree(folder, ignore_errors=True)  # of an older version, which had other arrays
        partial = root / f"{name}.{os.getpid()}.tmp"
        for stale in (partial, *root.glob(f"{name}.*.tmp")):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            examples = preparation.prepare(data, options, partial)
            _complete(partial, name, examples, options.heartbeat)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        os.replace(partial, folder)
    return load(root, name)


def load(root: Path, name: str) -> Tokens:
    """Map a complete cache into memory."""
    folder = root / name
    facts = json.loads((folder / "facts.json").read_text())
    files = tuple(FileReport.model_validate(file) for file in facts.pop("files"))
    problems = tuple(Problem(*problem) for problem in facts.pop("problems"))
    findings = tuple(Finding.model_validate(finding) for finding in facts.pop("findings"))
    arrays = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in _PARTS}
    return Tokens(**arrays, facts=Facts(**facts, files=files, problems=problems, findings=findings))


_PARTS = (*preparation.COLUMNS, "rank", "common")


def _complete(folder: Path, name: str, examples: preparation.Examples, heartbeat: Callable[[], None]) -> None:
    """Write what depends on all rows, next to their arrays."""
    prefixes = shared_prefixes.find(examples.arrays["ids"], examples.arrays["offsets"], heartbeat=heartbeat)
    for part, array in zip(("rank", "common"), prefixes, strict=True):
        np.save(folder / f"{part}.npy", array)
    facts = {
        "key": name,
        "format": examples.format,
        "dropped": examples.dropped,
        "unlabelled": examples.unlabelled,
        "duplicates": examples.duplicates,
        "truncated": examples.truncated,
        "files": [file.to_json() for file in examples.files],
        "findings": [finding.to_json() for finding in examples.findings],
        "problems": [
            [problem.number, problem.message, problem.file, problem.unlabelled] for problem in examples.problems
        ],
    }
    (folder / "facts.json").write_text(json.dumps(facts))
