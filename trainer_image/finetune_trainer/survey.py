"""What the rows turned out to be: splits → DataReport. Pure; no torch.

Called before anything is trained: by `data` on rank 0, by preflight, and by `finetune validate --data`. It reads the
token cache's arrays, never the files again, so it costs a second or two a million rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_api import data_report as r
from finetune_api.status import DataStatus
from finetune_trainer import alike, split, survey_samples
from finetune_trainer.examples import Examples
from finetune_trainer.render import Renderer
from finetune_trainer.rows import Problem
from finetune_trainer.tokens import Tokens

_BINS = 20
_PADDED_TOGETHER = 8
_NUMBERS_A_GROUP = 10
_NEARLY = "only in case, spaces, punctuation or numbers"


@dataclass(frozen=True)
class Measured:
    """The rows of some files, one number each. `tokens` is None where there is no tokenizer: lengths are characters."""

    numbers: NDArray[np.int64]
    origins: NDArray[np.int32]
    lengths: NDArray[np.int64]
    answers: NDArray[np.int64]
    whole: NDArray[np.int64]
    characters: NDArray[np.int64]
    digests: NDArray[np.uint8]
    prompts: NDArray[np.uint8]
    folded: NDArray[np.uint8]
    files: tuple[r.FileReport, ...]
    problems: tuple[Problem, ...]
    dropped: int
    unlabelled: int
    tokens: Tokens | None = None

    @classmethod
    def of_tokens(cls, t: Tokens) -> Measured:
        return cls(
            t.numbers, t.origins, t.lengths, t.label_counts, t.whole, t.characters, t.digests, t.prompts,
            t.folded, t.facts.files, t.facts.problems, t.facts.dropped, t.facts.unlabelled, t,
        )  # fmt: skip

    @classmethod
    def of_examples(cls, found: Examples) -> Measured:
        a = found.arrays
        return cls(
            a["numbers"], a["origins"], found.lengths, a["answers"], a["whole"], a["characters"], a["digests"],
            a["prompts"], a["folded"], found.files, found.problems, found.dropped, found.unlabelled,
        )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A split as rows of what was measured; with weights a row comes several times."""

    rows: Measured
    index: NDArray[np.int64]
    held_out: bool = False
    left_out: int = 0


def parts_of(
    measured: Mapping[r.SplitName, Measured], validation: float | None, test: float | None
) -> dict[r.SplitName, Part]:
    """The splits of what was read: held out of the training rows by a fraction where they have no files of their own.

    Raises Failed where nothing would be left to train on.
    """
    rows = measured["train"]
    kept = split.held_out(
        rows.digests, None if "validation" in measured else validation, None if "test" in measured else test
    )
    index = split.mixture(rows.digests, rows.origins, kept.train, [file.weight for file in rows.files])
    found: dict[r.SplitName, Part] = {"train": Part(rows, index, left_out=len(kept.train) - len(np.unique(index)))}
    own: tuple[tuple[r.SplitName, NDArray[np.int64] | None], ...] = (
        ("validation", kept.validation),
        ("test", kept.test),
    )
    for name, held in own:
        if name in measured:
            found[name] = Part(measured[name], np.arange(len(measured[name].numbers)))
        elif held is not None:
            found[name] = Part(rows, held, held_out=True)
    return found


def report(
    parts: Mapping[r.SplitName, Part], *, longest: int, renderer: Renderer | None, checks: tuple[str, ...] = ()
) -> r.DataReport:
    """`longest` is dataset.maxSequenceLength; `checks` say what was found of the template."""
    splits = tuple(_split(name, one) for name, one in parts.items())
    leaks = tuple(_leaks(parts))
    rule = renderer.rule if renderer else None
    return r.DataReport(
        unit="tokens" if renderer else "characters",
        max_sequence_length=longest,
        template=r.Template(choice=rule[0], reason=rule[1], checks=checks) if rule else None,
        splits=splits,
        leaks=leaks,
        warnings=tuple(_warnings(splits, leaks)),
        samples=tuple(
            shown
            for name, one in parts.items()
            if renderer and one.rows.tokens is not None
            for shown in survey_samples.of(name, one.rows.tokens, np.unique(one.index), renderer.tokenizer)
        ),
    )


def summary(found: r.DataReport) -> DataStatus:
    """What status shows of it."""
    rows = {one.split: one.rows for one in found.splits}
    train = found.splits[0]
    return DataStatus(
        rows=rows.get("train", 0),
        validation_rows=rows.get("validation"),
        test_rows=rows.get("test"),
        tokens=train.tokens,
        label_share=round(train.label_share, 4) if train.label_share is not None else None,
        dropped=sum(one.dropped for one in found.splits),
        duplicates=sum(one.duplicates.rows for one in found.splits),
        leaks=sum(leak.rows for leak in found.leaks),
        truncated=sum(one.truncated.rows for one in found.splits),
        warnings=tuple(f"{warning.reason}: {warning.message}"[:160] for warning in found.warnings[:6]),
    )


def _split(name: r.SplitName, one: Part) -> r.SplitReport:
    rows = one.rows
    index = np.unique(one.index)
    lengths, answers = rows.lengths[index], rows.answers[index]
    tokens = int(lengths.sum()) if rows.tokens is not None else None
    labels = int(answers.sum()) if rows.tokens is not None else None
    numbers = rows.numbers[index]
    same, near = alike.first(rows.digests[index]), alike.first(rows.folded[index])
    mine = np.arange(len(index))
    cut = index[rows.whole[index] > lengths]
    return r.SplitReport(
        split=name,
        files=() if one.held_out else rows.files,
        held_out=one.held_out,
        rows=len(index),
        examples=len(one.index),
        read=0 if one.held_out else len(rows.numbers) + rows.dropped,
        left_out=one.left_out,
        dropped=0 if one.held_out else rows.dropped,
        unlabelled=0 if one.held_out else rows.unlabelled,
        dropped_rows=() if one.held_out else tuple(
            r.DroppedRow(row=problem.number, file=problem.file, reason=problem.message)
            for problem in rows.problems[: r.LISTED]
        ),
        duplicates=_groups(same, np.flatnonzero(same != mine), numbers),
        near_duplicates=_groups(near, np.flatnonzero((same == mine) & (near != mine)), numbers),
        same_prompts=int((same == mine).sum() - (alike.first(rows.prompts[index]) == mine).sum()),
        characters=int(rows.characters[index].sum()),
        tokens=tokens,
        label_tokens=labels,
        label_share=labels / tokens if tokens and labels is not None else None,
        lengths=_histogram(lengths),
        answer_lengths=_histogram(answers),
        padding_share=_padding(lengths) if tokens else None,
        truncated=r.Truncated(
            rows=len(cut),
            tokens=int((rows.whole[cut] - rows.lengths[cut]).sum()),
            numbers=tuple(int(number) for number in rows.numbers[cut][: r.LISTED]),
        ),
        shared=_shared(rows.tokens, index, tokens or 0),
    )  # fmt: skip


def _groups(first: NDArray[np.int64], again: NDArray[np.int64], numbers: NDArray[np.int64]) -> r.Duplicates:
    """`again` are the rows that came before, at `first`."""
    groups: dict[int, list[int]] = {}
    for place in again.tolist():
        begin = int(first[place])
        if begin in groups or len(groups) < r.LISTED:
            group = groups.setdefault(begin, [int(numbers[begin])])
            if len(group) < _NUMBERS_A_GROUP:
                group.append(int(numbers[place]))
    return r.Duplicates(rows=len(again), groups=tuple(map(tuple, groups.values())))


def _leaks(parts: Mapping[r.SplitName, Part]) -> list[r.Leak]:
    """Train against validation and test, validation against test."""
    found = (_leak(one, other, parts) for one, other in itertools.combinations(parts, 2))
    return [leak for leak in found if leak.rows or leak.prompts or leak.near]


def _leak(first: r.SplitName, second: r.SplitName, parts: Mapping[r.SplitName, Part]) -> r.Leak:
    here, there = parts[first].rows, parts[second].rows
    mine, others = np.unique(parts[first].index), np.unique(parts[second].index)
    same, near, asked = (
        alike.among(theirs[others], ours[mine])
        for theirs, ours in (
            (there.digests, here.digests), (there.folded, here.folded), (there.prompts, here.prompts)
        )
    )  # fmt: skip

    def pairs(at: NDArray[np.int64], chosen: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
        places = np.flatnonzero(chosen)[: r.LISTED]
        firsts, seconds = here.numbers[mine[at[places]]], there.numbers[others[places]]
        return tuple(zip(firsts.tolist(), seconds.tolist(), strict=True))

    nearly = (same < 0) & (near >= 0)
    return r.Leak(
        first=first,
        second=second,
        rows=int((same >= 0).sum()),
        prompts=int((asked >= 0).sum()),
        near=int(nearly.sum()),
        examples=pairs(same, same >= 0),
        near_examples=pairs(near, nearly),
    )


def _warnings(splits: tuple[r.SplitReport, ...], leaks: tuple[r.Leak, ...]) -> list[r.Warning]:
    found = []
    train = splits[0]
    if train.split == "train" and train.rows < r.FEW_EXAMPLES:
        found.append(
            r.Warning(
                reason="FewExamples",
                message=f"{train.rows} training rows; gains are robust from about {r.FEW_EXAMPLES:,} on, 100 to 200 "
                "can already show something",
            )
        )
    for leak in leaks:
        for count, reason, what in (
            (leak.rows, "Leaks", f"that {leak.first} holds too"),
            (leak.near, "NearLeaks", f"different from a {leak.first} row {_NEARLY}"),
        ):
            if count:
                better = f"so the {leak.second} loss looks better than it is"
                found.append(r.Warning(reason=reason, message=f"{_rows(count, leak.second)} {what}, {better}"))
    for one in splits:
        for count, reason, what in (
            (one.duplicates.rows, "Duplicates", "that came before, seen again"),
            (one.near_duplicates.rows, "NearDuplicates", f"different from an earlier one {_NEARLY}"),
            (one.truncated.rows, "Truncated", "longer than dataset.maxSequenceLength, cut at the end"),
            (one.dropped - one.unlabelled, "RowsDropped", "that can't be used, left out"),
            (one.unlabelled, "Unlabelled", "without a label that is sure enough, left out"),
        ):
            if count:
                found.append(r.Warning(reason=reason, message=f"{_rows(count, one.split)} {what}"))
    return found


def _rows(count: int, split: r.SplitName) -> str:
    return f"{count:,} {split} row{'s' if count != 1 else ''}"


def _histogram(lengths: NDArray[np.int64]) -> r.Histogram:
    if not len(lengths):
        return r.Histogram()
    least, most = int(lengths.min()), int(lengths.max())
    step = next(s * 10**e for e in range(12) for s in (1, 2, 5) if s * 10**e * _BINS >= most - least)
    edges = np.arange(least // step * step, most + step + 1, step)
    counts, _ = np.histogram(lengths, edges)
    median, p95, p99 = (round(float(value), 1) for value in np.percentile(lengths, (50, 95, 99)))
    return r.Histogram(
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        minimum=int(lengths.min()),
        mean=round(float(lengths.mean()), 1),
        median=median,
        p95=p95,
        p99=p99,
        maximum=most,
    )


def _padding(lengths: NDArray[np.int64]) -> float:
    order = np.random.Generator(np.random.PCG64(0)).permutation(lengths)
    fill = -len(order) % _PADDED_TOGETHER
    batches = np.concatenate([order, np.zeros(fill, np.int64)]).reshape(-1, _PADDED_TOGETHER)
    sizes = np.full(len(batches), _PADDED_TOGETHER)
    sizes[-1] -= fill
    return float(1 - lengths.sum() / (batches.max(axis=1) * sizes).sum())


def _shared(tokens: Tokens | None, index: NDArray[np.int64], total: int) -> r.Shared:
    """Neighbours in the order of content; see `prefixes`."""
    if tokens is None or not total:
        return r.Shared()
    saved = tokens.prefixes.saved(index, tokens.lengths)
    return r.Shared(tokens=saved, share=saved / total)
