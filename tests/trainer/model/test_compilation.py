"""Compiled layers train as uncompiled ones do, and a resumed run ends with the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finetune_api.messages import events
from finetune_trainer.model import compilation
from testkit.rows import pairs
from trainer.support.rank_runs import Job, finish_all, prepare

_CONDITIONS = compilation.Conditions(
    device="cpu", half=True, independent_micro_batches=True, recompute=False, packed=True
)


@pytest.mark.parametrize(
    ("option", "changes", "before", "choice", "reason"),
    [
        ("auto", {"half": False}, None, False, "no gain was measured"),
        ("auto", {"device": "cuda"}, None, False, "no gain was measured"),
        ("always", {"half": False}, None, True, "set by training.compile"),
        ("never", {}, True, False, "set by training.compile"),
        ("auto", {}, True, True, "the checkpoint was computed this way"),
        ("always", {}, False, False, "the checkpoint was computed this way"),
        ("always", {"independent_micro_batches": False}, None, False, "sharded over the ranks"),
        ("always", {"recompute": True}, None, False, "recomputed"),
        ("always", {"packed": False}, None, False, "without padding"),
    ],
)
def test_compilation_is_decided_before_the_first_step(
    option: str, changes: dict[str, object], before: bool | None, choice: bool, reason: str
) -> None:
    conditions = compilation.Conditions(**{**_CONDITIONS.__dict__, **changes})
    decision = compilation.choice(option, conditions, before)  # type: ignore[arg-type]
    assert decision is not None
    assert (decision[0], reason in decision[1]) == (choice, True), decision


def test_a_run_that_gains_from_compilation_must_be_long_enough() -> None:
    assert compilation.choice("auto", _CONDITIONS, None) is None
    assert compilation.pays(3600) == (True, "training takes about 3600 s, compiling 15 s to save about 288 s")
    assert compilation.pays(300) == (False, "training takes about 300 s, compiling 15 s to save about 24 s")


def test_losses_are_the_same_and_a_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    """The resumed run is a separate process, which traces everything again. It finds the programs
    of the first run on its disk, as in a pod that was restarted, and needs no others."""

    def job(name: str, option: str, resume: Path | None = None) -> Job:
        return prepare(
            tmp_path / name, models["llama"], pairs(30), lora={"dropout": 0.1}, every=3, training={"compile": option},
            resume=resume, **({} if resume else {"test": pairs(2, 1), "samples": 1}),
        )  # fmt: skip

    plain, compiled = finish_all([job("plain", "never"), job("compiled", "always")])
    job_again = job("resumed", "always", compiled.paths.checkpoints / "step-3")
    shutil.copytree(compiled.paths.compiled, job_again.paths.compiled)
    resumed = job_again.finish().check()
    assert compiled.decision("compile").choice == "on"
    programs, later = ({path.name for path in run.paths.compiled.rglob("*.cpp")} for run in (compiled, resumed))
    assert programs
    assert later == programs
    assert plain.decision("compile").choice == "off"
    assert plain.decision("fused").choice == "on"
    assert all(event.topic != "fused" for event in compiled.events(events.DecisionEvent))
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-5)
    assert resumed.losses == compiled.losses[3:]
    name = "adapter_model.safetensors"
    assert (resumed.paths.export / name).read_bytes() == (compiled.paths.export / name).read_bytes()
