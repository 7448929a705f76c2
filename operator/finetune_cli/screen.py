"""Shows the progress of `finetune run` and its summary.

It writes to the terminal, and decides nothing.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from finetune_api.messages import progress as posted
from finetune_api.messages.evaluation import Evaluation
from finetune_api.messages.manifest import Manifest
from finetune_api.names import EVALUATION_PATH, HISTORY_PATH, MANIFEST_PATH, REPORT_PATH, SAMPLES_PATH

_BARS = "▁▂▃▄▅▆▇█"
_PHASES = {
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


def figures(latest: posted.Progress) -> str:
    """Formats the values that are known, as in `loss 2.134  eval 2.201  412 tokens/s  ETA 1:05`."""
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
    """Shows the figures at the end of the bar."""

    def render(self, task: Task) -> Text:
        """Returns the text of the column."""
        return Text(str(task.fields.get("figures", "")))


class Bar:
    """Shows a progress bar on a terminal.

    If the output isn't a terminal, it prints a line when the phase changes, and after each
    twentieth of the steps.
    """

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
        """Updates the bar, or prints a line."""
        phase = _PHASES.get(latest.phase, latest.phase)
        self._bar.update(
            self._task,
            description=phase,
            completed=latest.step,
            total=latest.total_steps or None,
            figures=figures(latest),
        )
        if not self._console.is_terminal:
            self._line(latest, phase)

    def _line(self, latest: posted.Progress, phase: str) -> None:
        every = max(1, latest.total_steps // 20)
        if self._shown[0] == phase and latest.step < self._shown[1] + every:
            return
        self._shown = (phase, latest.step)
        steps = f"step {latest.step}/{latest.total_steps}  " if latest.total_steps else ""
        self._console.print(f"{phase}: {steps}{figures(latest)}".rstrip(" :"), markup=False, highlight=False)


def summary(console: Console, output: Path, model: str) -> None:
    """Prints the result's files, losses, scores and first samples, and how to load it."""
    manifest = Manifest.model_validate_json((output / MANIFEST_PATH).read_bytes())
    files = Table(title=str(output), title_justify="left", box=None)
    files.add_column("file")
    files.add_column("bytes", justify="right")
    for file in manifest.files:
        files.add_row(file.path, f"{file.size:,}")
    console.print(files)
    if curve := loss_curve(output / HISTORY_PATH):
        console.print(curve, highlight=False)
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


def loss_curve(history: Path) -> str:
    """Returns a line with the training loss of all steps; empty if no history was written."""
    if not history.is_file():
        return ""
    parsed = (json.loads(line) for line in history.read_text(encoding="utf-8").splitlines() if line)
    values = [float(event["loss"]) for event in parsed if event.get("type") == "step"]
    if not values:
        return ""
    return f"training loss {sparkline(values)} {values[0]:.4f} → {values[-1]:.4f}"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Draws values as characters of different heights, from ▁ for the lowest to █ for the highest.

    More than `width` values are averaged in groups. Values that aren't finite are left out.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    columns = min(width, len(finite))
    bounds = [round(index * len(finite) / columns) for index in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    return "".join(_BARS[round((mean - low) / ((high - low) or 1.0) * (len(_BARS) - 1))] for mean in means)


def losses(metrics: dict[str, float]) -> list[str]:
    """Describes the losses that are known, one line each."""
    lines = []
    before, after = metrics.get("testLossBefore"), metrics.get("testLossAfter")
    if before is not None and after is not None:
        lines.append(f"test loss {before:.4f} → {after:.4f} ({100 * (after - before) / before:+.1f} %)")
    if "evalLoss" in metrics:
        lines.append(f"validation loss {metrics['evalLoss']:.4f}")
    for split, name in (("test", "test"), ("eval", "validation")):
        if f"{split}RewardAccuracy" in metrics:
            share, margin = metrics[f"{split}RewardAccuracy"], metrics[f"{split}RewardMargin"]
            lines.append(f"{name} pairs: {share:.1%} ranked correctly, reward margin {margin:.4f}")
    if "trainLoss" in metrics:
        lines.append(f"training loss {metrics['trainLoss']:.4f} (last of {metrics.get('steps', 0):.0f} steps)")
    return lines


def scores(path: Path) -> list[str]:
    """Describes the scores of evaluation.json, one line each; empty if there is no such file."""
    if not path.is_file():
        return []
    evaluation = Evaluation.model_validate_json(path.read_bytes())
    return [
        f"{score.name} {score.base:.4g} → {score.tuned:.4g} "
        f"(difference {score.low:+.4g} to {score.high:+.4g}, {score.verdict})"
        for score in evaluation.scores
    ]


def how_to_load(kind: str, output: Path, model: str) -> str:
    """Returns a few lines of Python that load the result."""
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
