"""What a run would refuse is refused when the rows are checked, and a resumed run has its rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_api.messages.run import RunConfig
from finetune_api.spec.rendering import RenderingSpec
from finetune_cli.main import main
from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.data.pipeline import Inputs, load_renderer
from finetune_trainer.training import job
from testkit.rows import pairs
from trainer.support.rank_runs import prepare

_JOB = """
apiVersion: finetune-operator.io/v1alpha1
kind: FineTuneJob
metadata: {name: a}
spec:
  model: {uri: s3://models/base}
  dataset: {uri: s3://data/train.jsonl}
  method: {type: lora, lora: {rank: 4, alpha: 8}}
  training: {maxSteps: 2, globalBatchSize: 2, learningRate: 1.0e-3, objective: OBJECTIVE}
  resources: {cpu: "1", memory: 4Gi}
  output: {uri: s3://outputs/a}
"""
_PAIR = {"prompt": "sky?", "chosen": "blue", "rejected": "green"}
_ANSWER = {"prompt": "sky?", "completion": "blue"}


@pytest.mark.parametrize(
    ("objective", "row", "message"),
    [
        ("supervised", _PAIR, "the rows have chosen and rejected answers; set training.objective: dpo"),
        ("dpo", _PAIR, ""),
        ("supervised", _ANSWER, ""),
        ("dpo", _ANSWER, "no usable row"),
    ],
)
def test_rows_that_dont_fit_the_objective_are_refused_before_training(
    objective: str, row: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(_JOB.replace("OBJECTIVE", objective))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert main(["validate", str(tmp_path / "job.yaml"), "--data", str(tmp_path / "rows.jsonl")]) == bool(message)
    assert message in capsys.readouterr().err


@dataclass(frozen=True)
class _Context:
    run: RunConfig


def test_a_resumed_run_keeps_the_date_of_its_checkpoint(models: dict[str, Path], tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %b') }}{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    plain = dated.replace("{{ strftime_now('%d %b') }}", "")
    prepared = prepare(tmp_path, models["llama"], pairs(3))
    paths = prepared.paths
    run = _dated(prepared.run, dated, "2026-12-01")
    context: Any = _Context(run)
    resumed = job._of_same_date(context, CheckpointState(date="2026-11-30")).run
    assert load_renderer(paths.model, resumed.data).template.date == "2026-11-30"
    assert job._of_same_date(context, CheckpointState()).run == run
    names = [Inputs.of_run(one, paths).cache_names["train"] for one in (run, resumed)]
    assert names[0] != names[1]
    days = (_dated(prepared.run, plain, day) for day in ("2026-12-01", "2026-12-02"))
    names = [Inputs.of_run(one, paths).cache_names["train"] for one in days]
    assert names[0] == names[1]


def _dated(run: RunConfig, template: str, date: str) -> RunConfig:
    data = run.data.model_copy(update={"chat_template": template, "rendering": RenderingSpec(date=date)})
    return run.model_copy(update={"data": data})
