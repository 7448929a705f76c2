"""Tests whether a run whose micro-batches are far too large continues with the same loss.

It also measures how much memory is lost to fragmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu import child, kit, running
from benchmarks.gpu.kit import Recipe

_EXPANDABLE = "expandable_segments:True"


def run(stage: child.Stage) -> None:
    with TemporaryDirectory(dir=running.scratch_root(stage.setting.device)) as name:
        root = Path(name)
        shape = kit.TINY if stage.setting.tiny else kit.LLAMA_30M
        model = kit.write_model(root / "model", shape.config())
        with stage.guarded("too large micro-batches"):
            _backoff(stage, model, root)
        for setting in () if stage.setting.short else ("", _EXPANDABLE):
            with stage.guarded(f"fragments{', expandable' if setting else ''}"):
                _fragments(stage, model, root, setting)


def _backoff(stage: child.Stage, model: Path, root: Path) -> None:
    """Runs the same job twice: with small micro-batches, and with one far too large for memory."""
    tokens, rows = (48, 8) if stage.setting.tiny else (480, 64)
    documents = kit.documents(2 * rows, tokens)
    training = {"global_batch_size": rows, "max_steps": 4, "learning_rate": 2e-2}
    fitting = Recipe(longest=2 * tokens, training={**training, "micro_batch_size": 1})
    too_large = replace(fitting, training={**training, "micro_batch_size": rows})
    limits = ("--most-tokens", str(3 * tokens)) if stage.setting.device != "cuda" else ("--memory", str(3 << 30))
    ran = {}
    for name, recipe, options in (("fitting", fitting, ()), ("too large", too_large, limits)):
        scratch = root / name.replace(" ", "-")
        scratch.mkdir()
        paths = kit.prepare(scratch, model, documents, recipe, device=stage.setting.device)
        ran[name] = running.run(paths, options=options, timeout=300)
    limited, unlimited = ran["too large"], ran["fitting"]
    halvings = [event["halvings"] for event in limited.events("backoff")]
    if limited.code or unlimited.code:
        stage.report(
            "too large micro-batches", "wrong", (limited if limited.code else unlimited).error, seconds=limited.seconds
        )
        return
    decrease = unlimited.losses[0] - unlimited.losses[-1]
    difference = max(abs(a - b) for a, b in zip(limited.losses, unlimited.losses, strict=True)) / decrease
    simulated = " (simulated)" if stage.setting.device != "cuda" else ""
    right = bool(halvings) and difference < 5e-2
    stage.report(
        "too large micro-batches", "right" if right else "wrong",
        f"halved {max(halvings, default=0)} times{simulated}; losses then differ by {difference:.1e} of their decrease "
        "from those of small micro-batches", seconds=limited.seconds, halvings=halvings, losses=limited.losses,
        expected=unlimited.losses,
    )  # fmt: skip


def _fragments(stage: child.Stage, model: Path, root: Path, setting: str) -> None:
    """Trains on 30 rows of different lengths, so that each needs other sizes from the allocator."""
    name = "fragments, expandable" if setting else "fragments"
    longest = 96 if stage.setting.tiny else 4096
    rows = [kit.documents(1, longest * (7 + 11 * index % 23) // 30)[0] for index in range(30)]
    training = {"global_batch_size": 1, "micro_batch_size": 1, "max_steps": 30}
    scratch = root / name.replace(", ", "-")
    scratch.mkdir()
    paths = kit.prepare(scratch, model, rows, Recipe(longest=longest, training=training), device=stage.setting.device)
    environment: Mapping[str, str] = (
        {"PYTORCH_ALLOC_CONF": setting, "PYTORCH_CUDA_ALLOC_CONF": setting} if setting else {}
    )
    ran = running.run(paths, environment=environment, timeout=300)
    if ran.code:
        stage.report(name, "wrong", ran.error, seconds=ran.seconds)
        return
    peak, reserved = (ran.observed.get(f"peak_{kind}_bytes") for kind in ("allocated", "reserved"))
    if not peak or not reserved:
        stage.report(name, "skipped", "the CPU has no such allocator; the run itself succeeded", seconds=ran.seconds)
        return
    text = f"{reserved / 2**30:.2f} GiB reserved for {peak / 2**30:.2f} allocated: {1 - peak / reserved:.0%} lost"
    stage.report(
        name, "figure", text, seconds=ran.seconds, setting=setting, peak_allocated_bytes=peak,
        peak_reserved_bytes=reserved, tokens_per_second=running.tokens_per_second(ran, skip=6),
    )  # fmt: skip


if __name__ == "__main__":
    child.main("memory", run)
