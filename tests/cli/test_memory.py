"""`finetune plan --model DIR` shows the memory that a model needs and the choices that would be
made, from the headers of its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_cli.main import main
from testkit.tiny_models import tiny_llama

ROOT = Path(__file__).parents[2]
LORA, FULL, NODES = (
    str(ROOT / "examples" / name) for name in ("quickstart.yaml", "full-zero3.yaml", "infiniband.yaml")
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("plan") / "model")


def test_a_plan_shows_what_each_strategy_needs_and_what_auto_chooses(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", LORA, "--model", str(model)]) == 0
    out = capsys.readouterr().out
    for part in ("  ddp ", "  zero2 ", "  fsdp ", "weights", "host memory of a pod: ", "chosen: ddp (it fits"):
        assert part in out


def test_the_memory_of_a_gpu_has_to_be_specified(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", FULL, "--model", str(model)]) == 0
    assert "--gpu-memory" in capsys.readouterr().out
    assert main(["plan", FULL, "--model", str(model), "--gpu-memory", "80Gi"]) == 0
    out = capsys.readouterr().out
    assert "chosen: zero3 (set by distribution.strategy)" in out
    for phase in ("host memory of a pod: ", " to load, ", " to train, ", " to save)"):
        assert phase in out
    assert main(["plan", FULL, "--model", str(model), "--gpu-memory", "large"]) == 1
    assert "is not a quantity" in capsys.readouterr().err


def test_a_plan_for_several_nodes_says_whether_each_of_them_has_a_copy_of_the_model(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", NODES, "--model", str(model), "--gpu-memory", "80Gi"]) == 0
    out = capsys.readouterr().out
    assert "  fsdp within each of 4 nodes " in out
    assert "chosen: fsdp within each of 4 nodes" in out
    assert "mesh: 4 x 8, a copy of the model on each node (it fits within a node: " in out


def test_a_folder_that_is_not_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LORA, "--model", str(tmp_path)]) == 1
    assert "model.uri" in capsys.readouterr().err
