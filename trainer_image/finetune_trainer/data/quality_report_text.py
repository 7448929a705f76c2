"""Formats a DataReport for people, on a terminal or in the log of a pod. The module is pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from finetune_api.messages.data_report import DataReport, Histogram, Leak, Piece, RenderedSample, SplitReport

_BAR_WIDTH = 40
_ROWS_SHOWN = 10
_GROUPS_SHOWN = 5
_NUMBERS_SHOWN = 3


def lines(report: DataReport, *, samples: bool = True, width: int | None = None) -> list[str]:
    """Return the lines of a report.

    The trained tokens of samples are enclosed in ⟦ and ⟧. With the `width` of a terminal no line is
    longer, and blank lines separate the parts.
    """
    parts = [_split_lines(split, report.unit) for split in report.splits]
    parts.append(_summary_lines(report))
    if samples:
        parts += [_sample_lines(sample) for sample in report.samples]
    if width is None:
        return [line for part in parts for line in part]
    return [short for part in parts for line in ("", *part) for short in _wrapped(line, width)][1:]


def _summary_lines(report: DataReport) -> list[str]:
    lines = [_leak_line(leak) for leak in report.leaks]
    if not report.leaks and len(report.splits) > 1:
        lines.append("leaks: none, no row is in several splits")
    if report.template:
        lines.append(f"rendering: {report.template.choice} ({report.template.reason})")
        lines += [f"  checked: {check}" for check in report.template.checks]
        lines += [f"  today's date in the template: {report.template.date}"] if report.template.date else []
    else:
        lines.append("no tokenizer: lengths are in characters; with --model DIR they are tokens, and rows are rendered")
    lines += [f"warning: {warning.reason}: {warning.message}" for warning in report.warnings]
    return lines


def _leak_line(leak: Leak) -> str:
    kinds = (
        (leak.rows, "identical", _row_numbers(leak.examples, "=")),
        (leak.near, "nearly identical", _row_numbers(leak.near_examples, "≈")),
        (leak.prompts, "with the same prompt", ""),
    )
    counts = ", ".join(f"{count:,} {kind}{rows}" for count, kind, rows in kinds if count)
    return f"{leak.second} rows that are also in {leak.first}: {counts}"


def _split_lines(split: SplitReport, unit: str) -> list[str]:
    lines = [_headline(split)]
    if len(split.files) > 1:
        lines += [
            f"  {file.name}: {_counted(file.rows)} of {file.format or 'no readable row'}, {file.dropped} dropped"
            + (f", weight {file.weight:g}" if file.weight != 1 else "")
            for file in split.files
        ]
    if split.left_out:
        lines.append(f"  left out by weight: {_counted(split.left_out)}")
    if split.dropped:
        lines += _dropped_lines(split)
    lines += [
        f"  duplicates: {split.duplicates.rows:,}{_row_numbers(split.duplicates.groups, '=')}",
        f"  near-duplicates: {split.near_duplicates.rows:,}{_row_numbers(split.near_duplicates.groups, '≈')}",
        f"  same prompt, different answer: {split.same_prompts:,}",
    ]
    if split.tokens is not None:
        lines += _token_lines(split, split.tokens)
    lines += _histogram_lines(split.lengths, unit)
    return lines


def _headline(split: SplitReport) -> str:
    formats = ", ".join(
        dict.fromkeys(f"{file.format} ({_file_format(file.container, file.compression)})" for file in split.files)
    )
    origin = f" of {formats}" if formats else ", held out of the training files"
    by_weight = " by weight" if any(file.weight != 1 for file in split.files) else ""
    weighted = f"; {split.examples:,} examples per epoch{by_weight}" if split.examples != split.rows else ""
    return f"{split.split}: {_counted(split.rows)}{origin}{weighted}"


def _counted(rows: int) -> str:
    return f"{rows:,} row{'' if rows == 1 else 's'}"


def _token_lines(split: SplitReport, tokens: int) -> list[str]:
    labels, shared, truncated = split.label_tokens or 0, split.shared, split.truncated
    numbers = ", ".join(map(str, truncated.numbers[:_ROWS_SHOWN]))
    cut = f"{_counted(truncated.rows)}, {truncated.tokens:,} tokens in total (rows {numbers})" if numbers else "none"
    return [
        f"  tokens: {tokens:,}, of which {labels:,} are trained on ({split.label_share or 0:.1%})",
        f"  shared prefixes: {shared.tokens:,} tokens ({shared.share:.1%}) that are computed only once",
        f"  padding: almost none with packing, otherwise {split.padding_share or 0:.1%} (batches of 8 rows)",
        f"  truncated: {cut}",
    ]


def _dropped_lines(split: SplitReport) -> list[str]:
    unlabelled = f", {split.unlabelled:,} of them without a confident label" if split.unlabelled else ""
    lines = [f"  dropped: {split.dropped:,} of {_counted(split.read)} read{unlabelled}"]
    lines += [
        f"    {f'{row.file} ' if row.file else ''}row {row.row}: {row.reason}"
        for row in split.dropped_rows[:_ROWS_SHOWN]
    ]
    if split.dropped > _ROWS_SHOWN:
        lines.append(f"    and {split.dropped - _ROWS_SHOWN:,} more")
    return lines


def _row_numbers(groups: Sequence[Sequence[int]], sign: str) -> str:
    """List the row numbers of the first groups."""
    listed = [
        sign.join(map(str, group[:_NUMBERS_SHOWN])) + ("…" if len(group) > _NUMBERS_SHOWN else "")
        for group in groups[:_GROUPS_SHOWN]
    ]
    more = ", …" if len(groups) > _GROUPS_SHOWN else ""
    return f" (rows {', '.join(listed)}{more})" if listed else ""


def _wrapped(line: str, width: int) -> list[str]:
    """Wrap a line under its beginning, and the text of a sample without changing its spaces."""
    if len(line) <= width:
        return [line]
    is_sample = line.startswith("  | ")
    indent = "  | " if is_sample else " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(
        line, width, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=not is_sample,
        replace_whitespace=False, tabsize=4,
    )  # fmt: skip


def _file_format(container: str, compression: str) -> str:
    return f"{container}, {compression}" if compression else container


def _histogram_lines(lengths: Histogram, unit: str) -> list[str]:
    lines = [
        f"  length in {unit}: median {lengths.median:g}, mean {lengths.mean:g}, 95 % up to {lengths.p95:g}, "
        f"99 % up to {lengths.p99:g}, from {lengths.minimum:,} to {lengths.maximum:,}"
    ]
    highest = max(lengths.counts, default=0)
    for begin, end, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        bar = "█" * -(-count * _BAR_WIDTH // highest) if highest else ""
        lines.append(f"  {begin:>8,} to {end - 1:<8,} {bar} {count:,}")
    return lines


def _sample_lines(sample: RenderedSample) -> list[str]:
    text = "".join(_marked(piece) for piece in sample.pieces)
    name = f"{sample.file} row {sample.row}" if sample.file else f"row {sample.row}"
    return [
        f"sample of {sample.split}, {name}, {sample.tokens} tokens{', shown in part' if sample.cut else ''}; "
        "⟦trained on⟧",
        *(f"  | {_printable(line)}" for line in text.split("\n")),
    ]


def _marked(piece: Piece) -> str:
    if not piece.learnt:
        return piece.text
    side = f"\n{piece.side}: " if piece.side else ""
    return f"{side}⟦{piece.text}⟧"


def _printable(line: str) -> str:
    """Return a line in which characters that a terminal would act on, or hide, are escaped."""
    return "".join(
        character if character.isprintable() or character == "\t" else repr(character)[1:-1] for character in line
    )
