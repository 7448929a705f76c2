"""What `finetune run` shows while it works and at the end. Writes to the terminal, decides nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from finetune_api import progress as posted
from finetune_api.evaluation import Evaluation
from finetune_api.manifest import Manifest
from finetune_api.names import EVALUATION_PATH, MANIFEST_PATH, REPORT_PATH, SAMPLES_PATH

_SAYS = {
    "starting": "starting",
    "fetching": "fetching model and data",
    "checking": "checking the rows",
    "loading": "loading the model",
    "tokenizing": "tokenizing",
    "training": "training",
    "evaluating": "evaluating",
    "saving": "saving",
    "uploading": "writing the result",
    "done": "done",
}


def said(latest: posted.Progress) -> str:
    """`loss 2.134  eval 2.201  412 tokens/s  ETA 1:05`, with what is known."""
    parts = []
    if latest.train_loss is not None:
        parts.append(f"loss {latest.train_loss:.4f}")
    if latest.eval_loss is not None:
        parts.append(f"eval {latest.eval_loss:.4f}")
    if latest.reward_accuracy is not None and latest.reward_margin is not None:
        parts.append(f"accuracy {latest.reward_accuracy:.3f}  margin {latest.reward_margin:.4f}")
    if latest.tokens_per_second is not None:
        parts.append(f"{latest.tokens_per_second:,.0f} tokens/s")
    if latest.eta_seconds:
        parts.append(f"ETA {latest.eta_seconds // 60}:{latest.eta_seconds % 60:02d}")
    return "  ".join(parts)


class _Figures(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("figures", "")))


class Bar:
    """A progress bar on a terminal; elsewhere one line whenever step or phase changed, at most every few steps."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: tuple[str, int] = ("", -1)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            _Figures(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.__exit__(kind, error, at)

    def show(self, latest: posted.Progress) -> None:
        phase = _SAYS.get(latest.phase, latest.phase)
        self._bar.update(
            self._task,
            description=phase,
            completed=latest.step,
            total=latest.total_steps or None,
            figures=said(latest),
        )
        if not self._console.is_terminal:
            self._line(latest, phase)

    def _line(self, latest: posted.Progress, phase: str) -> None:
        every = max(1, latest.total_steps // 20)
        if self._shown[0] == phase and latest.step < self._shown[1] + every:
            return
        self._shown = (phase, latest.step)
        steps = f"step {latest.step}/{latest.total_steps}  " if latest.total_steps else ""
        self._console.print(f"{phase}: {steps}{said(latest)}".rstrip(" :"), markup=False, highlight=False)


def summary(console: Console, output: Path, model: str) -> None:
    """Files, losses, a few answers, and how to go on."""
    manifest = Manifest.model_validate_json((output / MANIFEST_PATH).read_bytes())
    files = Table(title=str(output), title_justify="left", box=None)
    files.add_column("file")
    files.add_column("bytes", justify="right")
    for file in manifest.files:
        files.add_row(file.path, f"{file.size:,}")
    console.print(files)
    for line in losses(manifest.metrics):
        console.print(line, highlight=False)
    for line in scores(output / EVALUATION_PATH):
        console.print(line, highlight=False)
    if (output / REPORT_PATH).is_file():
        console.print(f"report {output / REPORT_PATH}", markup=False, highlight=False)
    for sample in _samples(output / SAMPLES_PATH):
        console.print("")
        for name in ("prompt", "before", "after", "reference"):
            console.print(Text(f"{name:>10}  ", "bold") + Text(str(sample.get(name, "")).strip()))
    console.print("\nTo use it:", style="bold")
    console.print(how_to_load(manifest.kind, output, model), markup=False, highlight=False)


def losses(metrics: dict[str, float]) -> list[str]:
    """Sentences about the losses that are there."""
    lines = []
    before, after = metrics.get("testLossBefore"), metrics.get("testLossAfter")
    if before is not None and after is not None:
        lines.append(f"test loss {before:.4f} → {after:.4f} ({100 * (after - before) / before:+.1f} %)")
    if "evalLoss" in metrics:
        lines.append(f"validation loss {metrics['evalLoss']:.4f}")
    for split, name in (("test", "test"), ("eval", "validation")):
        if f"{split}RewardAccuracy" in metrics:
            share, margin = metrics[f"{split}RewardAccuracy"], metrics[f"{split}RewardMargin"]
            lines.append(f"{name} pairs: {share:.1%} preferred as they should be, reward margin {margin:.4f}")
    if "trainLoss" in metrics:
        lines.append(f"training loss {metrics['trainLoss']:.4f} (last of {metrics.get('steps', 0):.0f} steps)")
    return lines


def scores(path: Path) -> list[str]:
    """A sentence for each score of evaluation.json, where there is one."""
    if not path.is_file():
        return []
    found = Evaluation.model_validate_json(path.read_bytes()).scores
    return [
        f"{score.name} {score.base:.4g} → {score.tuned:.4g} "
        f"(difference {score.low:+.4g} to {score.high:+.4g}, {score.verdict})"
        for score in found
    ]


def how_to_load(kind: str, output: Path, model: str) -> str:
    """A few lines of Python."""
    if kind == "adapter":
        return (
            "  from transformers import AutoModelForCausalLM\n"
            "  from peft import PeftModel\n"
            f"  base = AutoModelForCausalLM.from_pretrained({model!r})\n"
            f"  model = PeftModel.from_pretrained(base, {str(output)!r})"
        )
    return (
        "  from transformers import AutoModelForCausalLM\n"
        f"  model = AutoModelForCausalLM.from_pretrained({str(output)!r})"
    )


def _samples(path: Path, shown: int = 3) -> Iterable[dict[str, object]]:
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8").split("\n")[:shown]
    return tuple(json.loads(line) for line in lines if line)
