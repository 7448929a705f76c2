"""Compiled layers train as uncompiled ones do, and go on after a kill with the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finetune_api import events
from finetune_trainer import compiling
from trainer.ranks import Job, finish_all, pairs, prepare

_RUN = compiling.Run(device="cpu", half=True, alone=True, recompute=False, packed=True)


@pytest.mark.parametrize(
    ("asked", "change", "before", "choice", "told"),
    [
        ("auto", {"half": False}, None, False, "no gain was measured"),
        ("auto", {"device": "cuda"}, None, False, "no gain was measured"),
        ("always", {"half": False}, None, True, "says so"),
        ("never", {}, True, False, "says so"),
        ("auto", {}, True, True, "the checkpoint was computed so"),
        ("always", {}, False, False, "the checkpoint was computed so"),
        ("always", {"alone": False}, None, False, "split over the ranks"),
        ("always", {"recompute": True}, None, False, "recomputed"),
        ("always", {"packed": False}, None, False, "without padding"),
    ],
)
def test_it_is_decided_before_the_start(
    asked: str, change: dict[str, object], before: bool | None, choice: bool, told: str
) -> None:
    run = compiling.Run(**{**_RUN.__dict__, **change})
    decided = compiling.settled(asked, run, before)  # type: ignore[arg-type]
    assert decided is not None
    assert (decided[0], told in decided[1]) == (choice, True), decided


def test_where_it_gains_a_run_must_be_long_enough() -> None:
    assert compiling.settled("auto", _RUN, None) is None
    assert compiling.pays(3600) == (True, "training takes about 3600 s, compiling 15 s to save about 288 s")
    assert compiling.pays(300) == (False, "training takes about 300 s, compiling 15 s to save about 24 s")


def test_losses_stay_and_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, models: dict[str, Path]) -> None:
    """The resumed run is a process of its own, which traces everything anew. It finds the programs of the one before on
    its disk, as in a pod that was restarted, and needs no others."""

    def job(name: str, asked: str, resume: Path | None = None) -> Job:
        return prepare(
            tmp_path / name, models["llama"], pairs(30), lora={"dropout": 0.1}, every=3, training={"compile": asked},
            resume=resume, **({} if resume else {"test": pairs(2, 1), "samples": 1}),
        )  # fmt: skip

    plain, compiled = finish_all([job("plain", "never"), job("compiled", "always")])
    again = job("resumed", "always", compiled.paths.checkpoints / "step-3")
    shutil.copytree(compiled.paths.compiled, again.paths.compiled)
    resumed = again.finish().check()
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
