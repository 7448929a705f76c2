"""A DataReport for people at a terminal, or in a pod's log. Pure."""

from __future__ import annotations

from finetune_api.data_report import DataReport, Histogram, RenderedSample, SplitReport

_BAR = 40
_ROWS_SHOWN = 10


def lines(report: DataReport, *, samples: bool = True) -> list[str]:
    """Trained tokens of samples stand between ⟦ and ⟧."""
    found: list[str] = []
    for split in report.splits:
        found += _split(split, report.unit)
    for leak in report.leaks:
        pairs = ", ".join(f"{one}={other}" for one, other in leak.examples[:_ROWS_SHOWN])
        found.append(
            f"leaks: {leak.rows} {leak.second} rows are {leak.first} rows too"
            + (f" (rows {pairs})" if pairs else "")
            + f"; {leak.prompts} have a prompt that is there"
        )
    if not report.leaks and len(report.splits) > 1:
        found.append("leaks: none between the splits")
    if report.template:
        found.append(f"rendering: {report.template.choice} ({report.template.reason})")
        found += [f"  checked: {check}" for check in report.template.checks]
    else:
        found.append("no tokenizer: lengths are characters; with --model DIR they are tokens, and rows are rendered")
    found += [f"warning: {warning.reason}: {warning.message}" for warning in report.warnings]
    if samples:
        for sample in report.samples:
            found += _sample(sample)
    return found


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
        found.append(f"  dropped: {split.dropped:,} of {split.read:,} rows read")
        found += [
            f"    {f'{row.file} ' if row.file else ''}row {row.row}: {row.reason}"
            for row in split.dropped_rows[:_ROWS_SHOWN]
        ]
        if split.dropped > _ROWS_SHOWN:
            found.append(f"    and {split.dropped - _ROWS_SHOWN:,} more")
    again = "; ".join("=".join(map(str, group)) for group in split.duplicates.groups[:_ROWS_SHOWN])
    found.append(
        f"  duplicates: {split.duplicates.rows:,}"
        + (f" (rows {again})" if again else "")
        + f"; same prompt, other answer: {split.same_prompts:,}"
    )
    if split.tokens is not None and split.label_tokens is not None:
        found.append(
            f"  tokens: {split.tokens:,}, of which {split.label_tokens:,} are learnt ({split.label_share or 0:.1%})"
        )
        found.append(
            f"  padding: {split.padding_share or 0:.1%} were rows padded 8 at a time, none with packing; rows share "
            f"{split.shared.tokens:,} beginning tokens ({split.shared.share:.1%}), which need be computed once"
        )
        cut = ", ".join(map(str, split.truncated.numbers[:_ROWS_SHOWN]))
        found.append(
            f"  cut: {split.truncated.rows:,} rows, {split.truncated.tokens:,} tokens"
            + (f" (rows {cut})" if cut else "")
        )
    found += _histogram(split.lengths, unit)
    return found


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
