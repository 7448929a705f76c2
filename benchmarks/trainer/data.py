"""Creates the data sets from Debian's dict-jargon and wordnet-base, and caches them.

It also computes their statistics, and provides the demo's model without its chat template, so that
every system reads the rows as plain text.
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
"""Examples per optimizer step, the same for every system."""
LONGEST = 2048
"""The longest row in tokens, for every system."""
_ROWS = {"mixed": 1024, "short": 1024, "long": 160, "shared": 1024}


@dataclass(frozen=True)
class Statistics:
    """Statistics of a data set, in tokens. `common_prefix` is the length of all rows' prefix."""

    rows: int
    median: float
    mean: float
    longest: int
    label_share: float
    common_prefix: int
    attended_pairs_per_token: float


def model_folder() -> Path:
    """Returns a folder with the demo's model, but without its chat template."""
    original = model.folder()

    def write(target: Path) -> None:
        for file in original.iterdir():
            if file.name == "tokenizer_config.json":
                settings = json.loads(file.read_text())
                settings.pop("chat_template", None)
                (target / file.name).write_text(json.dumps(settings, indent=2) + "\n")
            elif file.name != "chat_template.jinja":
                (target / file.name).symlink_to(file)

    return write_once(f"{model.KEY}-plain-1", write)


def folder() -> Path:
    """Returns the cached folder with NAME.jsonl and NAME.json (statistics) of all data sets.

    The first call takes some seconds.
    """
    source = (
        b"".join(Path(module.__file__ or "").read_bytes() for module in (texts, dictd)) + Path(__file__).read_bytes()
    )
    return write_once(f"bench-trainer-{hashlib.sha256(source).hexdigest()[:12]}", _make)


def statistics(name: str) -> Statistics:
    """Returns the statistics of a data set."""
    return Statistics(**json.loads((folder() / f"{name}.json").read_text()))


def rows(name: str) -> list[dict[str, str]]:
    """Returns the rows of a data set."""
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

        def nouns(count_range: range) -> list[texts.Meaning]:
            with (wordnet / "index.noun").open() as index, (wordnet / "data.noun").open() as glosses:
                return texts.meanings(index, glosses, count_range)

        datasets = {
            "mixed": texts.mixed(entries, length, _ROWS["mixed"], median=44, mean=80, longest=750),
            "short": texts.short(nouns(range(7, 40)), _ROWS["short"]),
            "long": texts.long(entries, length, _ROWS["long"], shortest=1024, longest=1400),
            "shared": texts.shared(nouns(range(12, 30)), _ROWS["shared"]),
        }
    for name, pairs in datasets.items():
        (target / f"{name}.jsonl").write_text("".join(json.dumps(pair.to_json()) + "\n" for pair in pairs))
        tokens = [_tokens(tokenizer, pair) for pair in pairs]
        (target / f"{name}.json").write_text(json.dumps(asdict(describe(tokens)), indent=1) + "\n")


def _tokens(tokenizer: Any, pair: texts.Pair) -> tuple[list[int], int]:
    """Returns the ids with the end token, and how many of them are trained on.

    Raises ValueError if a token spans prompt and completion.
    """
    prompt = list(tokenizer(pair.prompt).input_ids)
    ids = [*tokenizer(pair.prompt + pair.completion).input_ids, tokenizer.eos_token_id]
    if ids[: len(prompt)] != prompt:
        raise ValueError(f"prompt and completion share a token: {pair.prompt[-20:]!r} + {pair.completion[:20]!r}")
    return ids, len(ids) - len(prompt)


def describe(tokens: list[tuple[list[int], int]]) -> Statistics:
    """Computes the statistics. `tokens` are the ids of each row and how many are trained on."""
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
        label_share=sum(in_loss for _, in_loss in tokens) / sum(lengths),
        common_prefix=common,
        attended_pairs_per_token=sum(n * (n + 1) / 2 for n in lengths) / sum(lengths),
    )
