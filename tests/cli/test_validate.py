"""`finetune validate --data --model` refuses what a run would refuse, and reports on long files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_cli.main import main
from finetune_cli.show_data import Progress
from testkit.rows import pairs
from testkit.tiny_models import tiny_phi3


def _job(folder: Path, **spec: Any) -> str:
    path = folder / "job.yaml"
    job = {
        "apiVersion": "finetune-operator.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"uri": "s3://models/tiny"},
            "dataset": {"uri": "s3://data/train.jsonl"},
            "method": {"type": "lora", "lora": {}},
            "training": {"maxSteps": 2, "globalBatchSize": 4},
            "output": {"uri": "s3://models/out"},
            **spec,
        },
    }
    path.write_text(yaml.safe_dump(job))
    return str(path)


def _rows(folder: Path) -> str:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(8)))
    return str(path)


def test_a_target_that_the_model_lacks_is_refused_and_all_linear_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default targets are q_proj and v_proj, which Phi-3 has in one layer."""
    model, rows = str(tiny_phi3(tmp_path / "phi3")), _rows(tmp_path)
    assert main(["validate", _job(tmp_path), "--data", rows, "--model", model]) == 1
    shown = capsys.readouterr()
    assert "train: 8 rows of prompt-completion" in shown.out
    assert "method.lora.targetModules: the model has no linear layer called " in shown.err
    assert "qkv_proj" in shown.err
    assert "Traceback" not in shown.err
    assert main(["plan", _job(tmp_path), "--model", model]) == 1
    assert "method.lora.targetModules: the model has no layer called " in capsys.readouterr().err
    lora = {"type": "lora", "lora": {"targetModules": ["all-linear"]}}
    assert main(["validate", _job(tmp_path, method=lora), "--data", rows, "--model", model]) == 0
    assert "trainable: " in capsys.readouterr().err


def test_rows_that_dont_fit_the_objective_are_refused_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = _job(tmp_path, training={"objective": "dpo", "maxSteps": 2, "globalBatchSize": 4})
    assert main(["validate", job, "--data", _rows(tmp_path)]) == 1
    assert "row 1: chosen is missing" in capsys.readouterr().err


def test_a_folder_with_a_tokenizer_alone_checks_only_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_phi3(tmp_path / "phi3")
    (model / "model.safetensors").unlink()
    assert main(["validate", _job(tmp_path), "--data", _rows(tmp_path), "--model", str(model)]) == 0
    assert "has no weights, so the model and the method aren't checked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("config.json", "tokenizer.json", "model.gguf"), "has model.gguf, which is a format for inference"),
        (("tokenizer.json", "adapter_config.json", "adapter_model.safetensors"), "is an adapter"),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), "has only pytorch_model.bin, which are pickles"),
        (None, "there is no such folder; give the folder of a Transformers model"),
    ],
    ids=["GGUF", "an adapter", "a pickle", "a file"],
)
def test_a_model_in_another_format_is_refused_and_not_passed_over(
    files: tuple[str, ...] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    if files is None:
        model.write_bytes(b"GGUF")
    else:
        tiny_phi3(model)
        for name in (path.name for path in list(model.iterdir()) if path.name not in files):
            (model / name).unlink()
        for name in files:
            (model / name).touch()
    assert main(["validate", _job(tmp_path), "--data", _rows(tmp_path), "--model", str(model)]) == 1
    assert message in capsys.readouterr().err


def test_the_rows_of_a_long_file_are_counted_every_few_seconds() -> None:
    seconds = iter([0.0, 1.0, 4.9, 5.0, 5.0, 9.0, 10.1, 10.1])
    out = io.StringIO()
    progress = Progress(out, lambda: next(seconds))
    for _ in range(5):
        progress()
    assert out.getvalue() == "3 rows read\n5 rows read\n"
