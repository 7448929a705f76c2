"""A DataReport for people at a terminal, or in a pod's log. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from finetune_api.data_report import DataReport, Histogram, RenderedSample, SplitReport

_BAR = 40
_ROWS_SHOWN = 10
_GROUPS_SHOWN = 5
_NUMBERS_SHOWN = 3


def lines(report: DataReport, *, samples: bool = True, width: int | None = None) -> list[str]:
    """Trained tokens of samples stand between ⟦ and ⟧. With a width, of a terminal, nothing is longer, and parts stand
    apart."""
    parts = [_split(split, report.unit) for split in report.splits]
    found: list[str] = []
    for leak in report.leaks:
        kinds = (
            (leak.rows, "the same row", _rows(leak.examples, "=")),
            (leak.near, "nearly the same row", _rows(leak.near_examples, "≈")),
            (leak.prompts, "the same prompt", ""),
        )
        said = "; ".join(f"{count:,} {what}{which}" for count, what, which in kinds if count)
        found.append(f"{leak.second} rows that {leak.first} has too: {said}")
    if not report.leaks and len(report.splits) > 1:
        found.append("no split has rows of another")
    if report.template:
        found.append(f"rendering: {report.template.choice} ({report.template.reason})")
        found += [f"  checked: {check}" for check in report.template.checks]
    else:
        found.append("no tokenizer: lengths are characters; with --model DIR they are tokens, and rows are rendered")
    found += [f"warning: {warning.reason}: {warning.message}" for warning in report.warnings]
    parts.append(found)
    if samples:
        parts += [_sample(sample) for sample in report.samples]
    if width is None:
        return [line for part in parts for line in part]
    return [short for part in parts for line in ("", *part) for short in _wrapped(line, width)][1:]


def _split(split: SplitReport, unit: str) -> list[str]:
    formats = ", ".join(
        dict.fromkeys(f"{file.format} ({_held(file.container, file.compression)})" for file in split.files)
    )
    head = f"{split.split}: {split.rows:,} rows" + (f" of {formats}" if formats else ", held out of the training files")
    if split.examples != split.rows:
        head += f"; {split.examples:,} examples an epoch by weight"
    found = [head]
    if len(split.files) > 1:
        found += [
            f"  {file.name}: {file.rows:,} rows of {file.format or 'no readable row'}, {file.dropped} dropped"
            + (f", weight {file.weight:g}" if file.weight != 1 else "")
            for file in split.files
        ]
    if split.left_out:
        found.append(f"  left out by weight: {split.left_out:,} rows")
    if split.dropped:
        unsure = f", {split.unlabelled:,} of them without a label that is sure enough" if split.unlabelled else ""
        found.append(f"  dropped: {split.dropped:,} of {split.read:,} rows read{unsure}")
        found += [
            f"    {f'{row.file} ' if row.file else ''}row {row.row}: {row.reason}"
            for row in split.dropped_rows[:_ROWS_SHOWN]
        ]
        if split.dropped > _ROWS_SHOWN:
            found.append(f"    and {split.dropped - _ROWS_SHOWN:,} more")
    found += [
        f"  duplicates: {split.duplicates.rows:,}{_rows(split.duplicates.groups, '=')}",
        f"  nearly the same: {split.near_duplicates.rows:,}{_rows(split.near_duplicates.groups, '≈')}",
        f"  same prompt, other answer: {split.same_prompts:,}",
    ]
    if split.tokens is not None and split.label_tokens is not None:
        found.append(
            f"  tokens: {split.tokens:,}, of which {split.label_tokens:,} are learnt ({split.label_share or 0:.1%})"
        )
        found.append(
            f"  shared beginnings: {split.shared.tokens:,} tokens ({split.shared.share:.1%}) that need be computed once"
        )
        found.append(f"  padding: hardly any with packing, else {split.padding_share or 0:.1%} (8 rows at a time)")
        cut = ", ".join(map(str, split.truncated.numbers[:_ROWS_SHOWN]))
        if cut:
            found.append(
                f"  cut: {split.truncated.rows:,} too long, {split.truncated.tokens:,} tokens in all (rows {cut})"
            )
        else:
            found.append("  cut: none")
    found += _histogram(split.lengths, unit)
    return found


def _rows(groups: Sequence[Sequence[int]], sign: str) -> str:
    """Numbers of the first of them."""
    shown = [
        sign.join(map(str, group[:_NUMBERS_SHOWN])) + ("…" if len(group) > _NUMBERS_SHOWN else "")
        for group in groups[:_GROUPS_SHOWN]
    ]
    more = ", …" if len(groups) > _GROUPS_SHOWN else ""
    return f" (rows {', '.join(shown)}{more})" if shown else ""


def _wrapped(line: str, width: int) -> list[str]:
    """What follows a line's beginning stands under it, a sample's text as it is."""
    if len(line) <= width:
        return [line]
    sample = line.startswith("  | ")
    lead = "  | " if sample else " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(
        line, width, subsequent_indent=lead, break_on_hyphens=False, drop_whitespace=not sample,
        replace_whitespace=False, tabsize=4,
    )  # fmt: skip


def _held(container: str, compression: str) -> str:
    return f"{container}, {compression}" if compression else container


def _histogram(of: Histogram, unit: str) -> list[str]:
    found = [
        f"  length in {unit}: median {of.median:g}, mean {of.mean:g}, 95 % up to {of.p95:g}, 99 % up to {of.p99:g}, "
        f"from {of.minimum:,} to {of.maximum:,}"
    ]
    most = max(of.counts, default=0)
    for begin, end, count in zip(of.edges, of.edges[1:], of.counts, strict=False):
        bar = "█" * -(-count * _BAR // most) if most else ""
        found.append(f"  {begin:>8,} to {end - 1:<8,} {bar} {count:,}")
    return found


def _sample(sample: RenderedSample) -> list[str]:
    text = "".join(f"⟦{piece.text}⟧" if piece.learnt else piece.text for piece in sample.pieces)
    at = f"{sample.file} row {sample.row}" if sample.file else f"row {sample.row}"
    return [
        f"sample of {sample.split}, {at}, {sample.tokens} tokens{', shown in part' if sample.cut else ''}; "
        "⟦what is learnt⟧",
        *(f"  | {line}" for line in text.splitlines()),
    ]
