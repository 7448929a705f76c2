"""Measures how much a repeated or resumed run differs from an uninterrupted one.

Runs are interrupted by SIGTERM or SIGKILL.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmarks.gpu import child, kit, running, timing
from benchmarks.gpu.kit import Recipe
from safetensors.torch import load_file
from torch import Tensor

from testkit.rows import pairs

_STEPS, _CUT = 12, 6


def run(stage: child.Stage) -> None:
    with TemporaryDirectory(dir=running.scratch_root(stage.setting.device)) as name:
        root = Path(name)
        shape = kit.TINY if stage.setting.tiny else kit.LLAMA_30M
        model = kit.write_model(root / "model", shape.config())
        training = {"max_steps": _STEPS, "learning_rate": 2e-2}
        recipe = Recipe(training=training, every=2, lora={"dropout": 0.05})
        uninterrupted: dict[str, running.FinishedRank] = {}
        with stage.guarded("left alone"):
            uninterrupted["ran"] = _run(stage, model, root / "uninterrupted", recipe)
            verification = uninterrupted["ran"].decision("reload") or uninterrupted["ran"].error
            stage.report(
                "reload",
                "right" if verification.startswith("equal") else "wrong",
                verification,
                seconds=uninterrupted["ran"].seconds,
            )
        cases = ("stopped by SIGTERM",) if stage.setting.short else ("repeated", "stopped by SIGTERM", "killed")
        for case in cases:
            with stage.guarded(case):
                _compare(stage, case, model, root, recipe, uninterrupted["ran"])
    with stage.guarded("answers"):
        _answers(stage)


def _run(stage: child.Stage, model: Path, scratch: Path, recipe: Recipe) -> running.FinishedRank:
    return running.run(_prepared(stage, model, scratch, recipe), timeout=300)


def _prepared(stage: child.Stage, model: Path, scratch: Path, recipe: Recipe) -> running.Paths:
    scratch.mkdir()
    return kit.prepare(scratch, model, pairs(60), recipe, device=stage.setting.device)


def _compare(
    stage: child.Stage, case: str, model: Path, root: Path, recipe: Recipe, uninterrupted: running.FinishedRank
) -> None:
    began = time.monotonic()
    name = case.replace(" ", "-")
    at = 0
    if case != "repeated":
        rank = running.Rank(_prepared(stage, model, root / f"{name}-first", recipe))
        rank.until(lambda: rank.steps() >= _CUT and bool(_checkpoints(rank.paths.checkpoints)), 240)
        rank.process.send_signal(signal.SIGTERM if case.startswith("stopped") else signal.SIGKILL)
        code = rank.wait(180).code
        checkpoint = _checkpoints(rank.paths.checkpoints)[-1]
        at = int(checkpoint.name.removeprefix("step-"))
        if case.startswith("stopped") and (code or not running.read_events(rank.paths, "preempted")):
            stage.report(
                case, "wrong", f"it ended with code {code} without reporting the preemption: {rank.wait(1).error}"
            )
            return
        recipe = replace(recipe, resume=checkpoint)
    ran = _run(stage, model, root / name, recipe)
    if ran.code:
        stage.report(case, "wrong", ran.error)
        return
    expected = uninterrupted.losses[at:]
    difference = max(abs(a - b) for a, b in zip(ran.losses, expected, strict=True))
    actual, reference = (_adapter(rank.paths.export) for rank in (ran, uninterrupted))
    same = all(torch.equal(actual[key], reference[key]) for key in reference)
    distance = max(timing.distance(actual[key], reference[key]) for key in reference)
    decrease = uninterrupted.losses[0] - min(uninterrupted.losses)
    text = (
        f"losses differ by {difference / decrease:.1e} of their decrease, "
        f"adapter {'bit-identical' if same else f'differs by {distance:.1e}'}"
    )
    stage.report(
        case, "right" if difference < 5e-2 * decrease else "wrong", text + (f", resumed at step {at}" if at else ""),
        seconds=time.monotonic() - began, bitwise=same, adapter_distance=distance, loss_distance=difference,
        resumed_at=at,
    )  # fmt: skip


def _checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints, oldest first."""
    complete = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def _adapter(folder: Path) -> Mapping[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _answers(stage: child.Stage) -> None:
    """Measures the tokens per second that the evaluation generates for 32 prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune_api.resource import GenerationSpec
    from finetune_trainer.evaluation import generation

    device, tiny = stage.setting.device, stage.setting.tiny
    with TemporaryDirectory(dir=running.scratch_root(device)) as name:
        shape = kit.TINY if tiny else kit.LLAMA_1B
        folder = kit.write_large_model(Path(name) / "model", shape, device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        prompts = [list(range(6, 46 + index)) for index in range(8 if tiny else 32)]
        new = 8 if tiny else 64
        settings = generation.GenerationSettings(tokenizer, frozenset({2**20}), new, GenerationSpec(), None, device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            duration = timing.seconds(
                lambda: generation.generate(model, prompts, settings, seed=0, heartbeat=lambda: None),
                device,
                budget=1,
                least=1,
            )
    rate = len(prompts) * new / duration
    text = f"{rate:.0f} tokens/s for {len(prompts)} prompts at a time, {rate / len(prompts):.1f} each, {shape.name}"
    stage.report("answers", "figure", text, tokens_per_second=rate, shape=shape.name)


if __name__ == "__main__":
    child.main("resume", run)
