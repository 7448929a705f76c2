"""The commands in the examples of data formats are run unchanged: each reads the sample rows as its
example describes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_api.messages.data_report import DataReport
from finetune_cli.main import main
from testkit.tiny_models import tokenizer

ROOT = Path(__file__).parents[2]
_COMMANDS = [
    line.removeprefix("#").split()
    for path in sorted((ROOT / "examples").glob("data-*.yaml"))
    for line in path.read_text().splitlines()
    if line.startswith("#   finetune validate ")
]
_FORMATS = {"alpaca", "sharegpt", "text", "messages", "label-studio", "snorkel", "prompt-completion, alpaca"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and its configuration."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer().save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.parametrize("command", _COMMANDS, ids=lambda command: command[-1].rpartition("/")[2])
def test_a_data_report_of_an_example(
    command: list[str], model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(command[1:]) == 0
    output = capsys.readouterr().out
    assert "length in characters" in output
    assert "FewExamples" in output
    assert main([*command[1:], "--model", str(model), "-o", "json"]) == 0
    report = DataReport.model_validate_json(capsys.readouterr().out)
    train = report.splits[0]
    held_out = sum(split.rows for split in report.splits if split.held_out)
    assert train.read == train.rows + train.left_out + held_out + train.dropped
    assert train.rows >= 3 - held_out
    assert train.dropped == train.unlabelled == (2 if command[-1].endswith("probabilities.csv") else 0)
    assert ", ".join(file.format for file in train.files) in _FORMATS
    assert train.label_tokens
    assert any(piece.learnt for sample in report.samples for piece in sample.pieces)


def test_every_format_has_an_example() -> None:
    assert {command[2].removeprefix("examples/data-").removesuffix(".yaml") for command in _COMMANDS} == {
        "alpaca", "sharegpt", "text", "tools", "label-studio", "snorkel", "mixture",
    }  # fmt: skip
