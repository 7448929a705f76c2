"""The data sets as files in the cache, made once from Debian's dict-jargon and wordnet-base; and their statistics.

Called by `__main__`. Also a view of the demo's model without its chat template, so that every system reads the rows
as the plain text that they are.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.trainer import dictd, texts

from demo_assets import model
from demo_assets.package import debian_files, write_once

NAMES = ("mixed", "short", "long", "shared")
GLOBAL_BATCH = {"mixed": 64, "short": 64, "long": 8, "shared": 64}
"""Examples of an optimizer step, the same for every system."""
LONGEST = 2048
"""Tokens; no row is longer than this, for no system."""
_ROWS = {"mixed": 1024, "short": 1024, "long": 160, "shared": 1024}


@dataclass(frozen=True)
class Statistics:
    """Of one data set's tokens; `common_prefix` is what all rows begin with."""

    rows: int
    median: float
    mean: float
    longest: int
    label_share: float
    common_prefix: int
    attended_pairs_per_token: float


def model_folder() -> Path:
    """The demo's model; its chat template is left out."""
    whole = model.folder()

    def write(target: Path) -> None:
        for file in whole.iterdir():
            if file.name == "tokenizer_config.json":
                settings = json.loads(file.read_text())
                settings.pop("chat_template", None)
                (target / file.name).write_text(json.dumps(settings, indent=2) + "\n")
            elif file.name != "chat_template.jinja":
                (target / file.name).symlink_to(file)

    return write_once(f"{model.KEY}-plain-1", write)


def folder() -> Path:
    """<name>.jsonl and <name>.json (statistics) of all sets; some seconds the first time."""
    source = b"".join(Path(each.__file__ or "").read_bytes() for each in (texts, dictd)) + Path(__file__).read_bytes()
    return write_once(f"bench-trainer-{hashlib.sha256(source).hexdigest()[:12]}", _make)


def statistics(name: str) -> Statistics:
    return Statistics(**json.loads((folder() / f"{name}.json").read_text()))


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder() / f"{name}.jsonl").read_text().splitlines()]


def _make(target: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(model_folder()), local_files_only=True)

    def length(text: str) -> int:
        return len(tokenizer(text).input_ids)

    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        jargon = debian_files("dict-jargon", Path(scratch)) / "usr/share/dictd"
        with (jargon / "jargon.index").open() as index:
            entries = list(dictd.entries(index, gzip.decompress((jargon / "jargon.dict.dz").read_bytes())))
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wordnet = debian_files("wordnet-base", Path(scratch)) / "usr/share/wordnet"

        def nouns(words: range) -> list[texts.Meaning]:
            with (wordnet / "index.noun").open() as index, (wordnet / "data.noun").open() as glosses:
                return texts.meanings(index, glosses, words)

        made = {
            "mixed": texts.mixed(entries, length, _ROWS["mixed"], median=44, mean=80, longest=750),
            "short": texts.short(nouns(range(7, 40)), _ROWS["short"]),
            "long": texts.long(entries, length, _ROWS["long"], shortest=1024, longest=1400),
            "shared": texts.shared(nouns(range(12, 30)), _ROWS["shared"]),
        }
    for name, pairs in made.items():
        (target / f"{name}.jsonl").write_text("".join(json.dumps(pair.to_json()) + "\n" for pair in pairs))
        tokens = [_tokens(tokenizer, pair) for pair in pairs]
        (target / f"{name}.json").write_text(json.dumps(asdict(describe(tokens)), indent=1) + "\n")


def _tokens(tokenizer: Any, pair: texts.Pair) -> tuple[list[int], int]:
    """(ids with the end token, how many of them are learnt)"""
    prompt = list(tokenizer(pair.prompt).input_ids)
    whole = [*tokenizer(pair.prompt + pair.completion).input_ids, tokenizer.eos_token_id]
    if whole[: len(prompt)] != prompt:
        raise ValueError(f"prompt and completion share a token: {pair.prompt[-20:]!r} + {pair.completion[:20]!r}")
    return whole, len(whole) - len(prompt)


def describe(tokens: list[tuple[list[int], int]]) -> Statistics:
    """`tokens`: (ids, learnt ones) of each row."""
    lengths = [len(ids) for ids, _ in tokens]
    first = tokens[0][0]
    common = next(
        (i for i, token in enumerate(first) if any(i >= len(ids) or ids[i] != token for ids, _ in tokens)), len(first)
    )
    return Statistics(
        rows=len(tokens),
        median=median(lengths),
        mean=mean(lengths),
        longest=max(lengths),
        label_share=sum(learnt for _, learnt in tokens) / sum(lengths),
        common_prefix=common,
        attended_pairs_per_token=sum(n * (n + 1) / 2 for n in lengths) / sum(lengths),
    )
