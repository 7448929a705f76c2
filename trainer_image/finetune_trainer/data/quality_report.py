"""Builds the data report, which describes the rows of each split.

The module is pure and doesn't import torch. The report is computed from the arrays of the token
cache and never reads the files again, so it costs a second or two per million rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from finetune_api.messages import data_report as r
from finetune_api.status import DataStatus
from finetune_trainer.data import dedup, sources
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.reading import findings
from finetune_trainer.data.rendering.samples import samples
from finetune_trainer.data.splits import SplitRows
from finetune_trainer.data.token_cache import Tokens

_BINS = 20
_PADDED_BATCH = 8  # examples
_LINES_PER_GROUP = 10
_NEARLY = "only in case, spaces, punctuation or numbers"


def report(
    splits: Mapping[r.SplitName, SplitRows],
    *,
    max_length: int,
    renderer: Renderer | None,
    template_checks: tuple[str, ...] = (),
) -> r.DataReport:
    """Return the data report of these splits.

    `max_length` is dataset.maxSequenceLength. Without a renderer, lengths are characters and no
    sample is shown. `template_checks` are the checks that the chat template passed.
    """
    reports = tuple(_split_report(name, split) for name, split in splits.items())
    leaks = tuple(_leaks(splits))
    return r.DataReport(
        unit="tokens" if renderer else "characters",
        max_sequence_length=max_length,
        template=_template(renderer, template_checks) if renderer else None,
        splits=reports,
        leaks=leaks,
        warnings=(*_template_warnings(renderer), *_warnings(reports, leaks)),
        samples=tuple(
            sample
            for name, split in splits.items()
            if renderer
            for sample in samples(name, split.rows, np.unique(split.index), renderer.tokenizer)
        ),
    )


def summary(report: r.DataReport) -> DataStatus:
    """Return the part of the report that the status of a FineTuneJob shows."""
    rows = {split.split: split.rows for split in report.splits}
    train = report.splits[0]
    return DataStatus(
        rows=rows.get("train", 0),
        validation_rows=rows.get("validation"),
        test_rows=rows.get("test"),
        tokens=train.tokens,
        label_share=round(train.label_share, 4) if train.label_share is not None else None,
        dropped=sum(split.dropped for split in report.splits),
        duplicates=sum(split.duplicates.rows for split in report.splits),
        leaks=sum(leak.rows for leak in report.leaks),
        truncated=sum(split.truncated.rows for split in report.splits),
        warnings=tuple(f"{warning.reason}: {warning.message}"[:160] for warning in report.warnings[:6]),
    )


def _split_report(name: r.SplitName, split: SplitRows) -> r.SplitReport:
    rows = split.rows
    examples = np.unique(split.index)
    index = rows.rows_of(examples)
    lengths, label_counts = rows.lengths[examples], rows.label_counts[examples]
    tokens = int(lengths.sum()) if rows.tokens is not None else None
    label_tokens = int(label_counts.sum()) if rows.tokens is not None else None
    lines = rows.line_numbers[index]
    first_equal = dedup.first_occurrence(rows.digests[index])
    first_similar = dedup.first_occurrence(rows.near_duplicate_digests[index])
    positions = np.arange(len(index))
    first_prompts = dedup.first_occurrence(rows.prompts[index]) == positions
    similar = np.flatnonzero((first_equal == positions) & (first_similar != positions))
    cut = examples[rows.uncut_lengths[examples] > lengths]
    cut_lines = dict.fromkeys(zip(rows.file_index[cut].tolist(), rows.line_numbers[cut].tolist(), strict=True))
    return r.SplitReport(
        split=name,
        files=() if split.held_out else rows.files,
        held_out=split.held_out,
        rows=len(index),
        examples=len(split.index),
        read=0 if split.held_out else rows.count + rows.dropped,
        left_out=split.left_out,
        dropped=0 if split.held_out else rows.dropped,
        unlabelled=0 if split.held_out else rows.unlabelled,
        dropped_rows=() if split.held_out else tuple(
            r.DroppedRow(row=problem.number, file=problem.file, reason=problem.message)
            for problem in rows.problems[: r.LISTED]
        ),
        findings=() if split.held_out else rows.findings,
        duplicates=_groups(first_equal, np.flatnonzero(first_equal != positions), lines),
        near_duplicates=_groups(first_similar, similar, lines),
        same_prompts=int((first_equal == positions).sum() - first_prompts.sum()),
        characters=int(rows.characters[index].sum()),
        tokens=tokens,
        label_tokens=label_tokens,
        label_share=label_tokens / tokens if tokens and label_tokens is not None else None,
        lengths=_histogram(lengths),
        answer_lengths=_histogram(label_counts),
        padding_share=_padding_share(lengths) if tokens else None,
        truncated=r.TruncatedRows(
            rows=len(cut_lines),
            tokens=int((rows.uncut_lengths[cut] - rows.lengths[cut]).sum()),
            numbers=tuple(line for _, line in cut_lines)[: r.LISTED],
        ),
        shared=_shared_prefixes(rows.tokens, examples, tokens or 0),
    )  # fmt: skip


def _template(renderer: Renderer, checks: tuple[str, ...]) -> r.Template:
    choice, reason = renderer.rule
    return r.Template(choice=choice, reason=reason, checks=checks, date=renderer.template.date or "")


def _template_warnings(renderer: Renderer | None) -> Iterator[r.DataWarning]:
    """Yield a warning if another rendering of the same row can differ."""
    if renderer is None or not renderer.chat:
        return
    template = renderer.template
    if template.date is not None:
        message = (
            f"the chat template writes today's date, which is {template.date} in every row of this job; requests will "
            "have other dates, and another job is exactly the same only with dataset.rendering.date"
        )
        yield r.DataWarning(reason="TemplateVaries", message=message)
    if template.picks_at_random:
        message = "the chat template picks at random; a row is always rendered alike here, but a request isn't"
        yield r.DataWarning(reason="TemplateVaries", message=message)


def _groups(first: NDArray[np.int64], repeated: NDArray[np.int64], lines: NDArray[np.int64]) -> r.Duplicates:
    """Group duplicates.

    `repeated` are indices of rows that repeat an earlier row; `first[i]` is the index of the
    earliest row equal to row i; `lines[i]` is its line number.
    """
    groups: dict[int, list[int]] = {}
    for index in repeated.tolist():
        earliest = int(first[index])
        if earliest in groups or len(groups) < r.LISTED:
            group = groups.setdefault(earliest, [int(lines[earliest])])
            if len(group) < _LINES_PER_GROUP:
                group.append(int(lines[index]))
    return r.Duplicates(rows=len(repeated), groups=tuple(map(tuple, groups.values())))


def _leaks(splits: Mapping[r.SplitName, SplitRows]) -> list[r.Leak]:
    """Return the rows that train shares with validation or test, and validation with test."""
    leaks = (_leak(first, second, splits) for first, second in itertools.combinations(splits, 2))
    return [leak for leak in leaks if leak.rows or leak.prompts or leak.near]


def _leak(first: r.SplitName, second: r.SplitName, splits: Mapping[r.SplitName, SplitRows]) -> r.Leak:
    first_rows, second_rows = splits[first].rows, splits[second].rows
    first_index, second_index = (rows.rows_of(np.unique(splits[name].index)) for name, rows in
                                 ((first, first_rows), (second, second_rows)))  # fmt: skip
    equal, similar, same_prompt = (
        dedup.first_match(second_digests[second_index], first_digests[first_index])
        for second_digests, first_digests in (
            (second_rows.digests, first_rows.digests),
            (second_rows.near_duplicate_digests, first_rows.near_duplicate_digests),
            (second_rows.prompts, first_rows.prompts),
        )
    )

    def line_pairs(matches: NDArray[np.int64], chosen: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
        """Return (line in the first split, line in the second one) for the first chosen rows."""
        positions = np.flatnonzero(chosen)[: r.LISTED]
        lines = first_rows.line_numbers[first_index[matches[positions]]]
        return tuple(zip(lines.tolist(), second_rows.line_numbers[second_index[positions]].tolist(), strict=True))

    near = (equal < 0) & (similar >= 0)
    return r.Leak(
        first=first,
        second=second,
        rows=int((equal >= 0).sum()),
        prompts=int((same_prompt >= 0).sum()),
        near=int(near.sum()),
        examples=line_pairs(equal, equal >= 0),
        near_examples=line_pairs(similar, near),
    )


def _warnings(splits: tuple[r.SplitReport, ...], leaks: tuple[r.Leak, ...]) -> list[r.DataWarning]:
    warnings = []
    train = splits[0]
    if train.split == "train" and train.rows < r.FEW_EXAMPLES:
        message = (
            f"{_counted_rows(train.rows, 'training')}; gains are robust from about {r.FEW_EXAMPLES:,} on, 100 to 200 "
            "can already show something"
        )
        warnings.append(r.DataWarning(reason="FewExamples", message=message))
    warnings += sources.held_out_files(train)
    for leak in leaks:
        for count, reason, description in (
            (leak.rows, "Leaks", f"that {leak.first} holds too"),
            (leak.near, "NearLeaks", f"different from a {leak.first} row {_NEARLY}"),
        ):
            if count:
                effect = f"so the {leak.second} loss looks better than it is"
                message = f"{_counted_rows(count, leak.second)} {description}, {effect}"
                warnings.append(r.DataWarning(reason=reason, message=message))
    warnings += [warning for split in splits for warning in findings.warnings(split)]
    for split in splits:
        for count, reason, description in (
            (split.duplicates.rows, "Duplicates", "that repeat an earlier row"),
            (split.near_duplicates.rows, "NearDuplicates", f"different from an earlier one {_NEARLY}"),
            (split.truncated.rows, "Truncated", "longer than dataset.maxSequenceLength, cut at the end"),
            (split.dropped - split.unlabelled, "RowsDropped", "that can't be used, left out"),
            (split.unlabelled, "Unlabelled", "without a confident label, left out"),
        ):
            if count:
                warnings.append(
                    r.DataWarning(reason=reason, message=f"{_counted_rows(count, split.split)} {description}")
                )
    return warnings


def _counted_rows(count: int, split: str) -> str:
    return f"{count:,} {split} row{'s' if count != 1 else ''}"


def _histogram(lengths: NDArray[np.int64]) -> r.Histogram:
    """Return about 20 bins whose width is 1, 2 or 5 times a power of ten."""
    if not len(lengths):
        return r.Histogram()
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = next(s * 10**e for e in range(12) for s in (1, 2, 5) if s * 10**e * _BINS >= longest - shortest)
    edges = np.arange(shortest // width * width, longest + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    median, p95, p99 = (round(float(value), 1) for value in np.percentile(lengths, (50, 95, 99)))
    return r.Histogram(
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        minimum=shortest,
        mean=round(float(lengths.mean()), 1),
        median=median,
        p95=p95,
        p99=p99,
        maximum=longest,
    )


def _padding_share(lengths: NDArray[np.int64]) -> float:
    """Return the share of padding, from 0 to 1, among the tokens of padded batches of 8 examples in
    random order."""
    shuffled = np.random.Generator(np.random.PCG64(0)).permutation(lengths)
    fill = -len(shuffled) % _PADDED_BATCH
    batches = np.concatenate([shuffled, np.zeros(fill, np.int64)]).reshape(-1, _PADDED_BATCH)
    sizes = np.full(len(batches), _PADDED_BATCH)
    sizes[-1] -= fill
    return float(1 - lengths.sum() / (batches.max(axis=1) * sizes).sum())


def _shared_prefixes(tokens: Tokens | None, index: NDArray[np.int64], total: int) -> r.SharedPrefixes:
    """Return how many of `total` tokens are saved by computing shared prefixes only once."""
    if tokens is None or not total:
        return r.SharedPrefixes()
    saved = tokens.prefixes.saved(index, tokens.lengths)
    return r.SharedPrefixes(tokens=saved, share=saved / total)
