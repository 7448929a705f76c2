"""Every example is a test: the real parser reads it as kubectl would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.support.requirements import MODEL_BYTES, comment, required, uris
from finetune_api.amounts import amounts
from finetune_api.resource import parse
from finetune_api.scalars import quantity_value
from finetune_api.yaml import load_all
from finetune_cli.main import main

_EXAMPLES = Path(__file__).parents[2] / "examples"
_FILES = sorted(_EXAMPLES.rglob("*.yaml"))
EXAMPLES = [path for path in _FILES if "kind: FineTuneJob" in path.read_text()]


def _read(name: str) -> str:
    return (_EXAMPLES / name).read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_job(path: Path) -> None:
    (document,) = load_all(path.read_text())
    job = parse(document)
    assert job.spec.distribution.nodes >= 1
    assert len(job.metadata.name) <= 50


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_what_must_exist(path: Path) -> None:
    text = path.read_text()
    (document,) = load_all(text)
    if required(document["spec"]):
        assert comment(document["spec"]) in text, f"{path.name} must have:\n{comment(document['spec'])}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_files_of_an_example_fit_onto_its_scratch_disk(path: Path) -> None:
    (document,) = load_all(path.read_text())
    merged = document["spec"]["output"].get("merge", False)
    for uri in uris(document["spec"]["model"]):
        if uri.startswith("hf://"):
            model = MODEL_BYTES[uri.removeprefix("hf://")]
            scratch = quantity_value(amounts(parse(document).spec, int(model)).scratch)
            assert scratch >= model * (2 if merged else 1) + 2e9, f"{uri} has {model / 1e9:.1f} GB"


def test_the_article_recipe_has_the_values_of_the_guides() -> None:
    (document,) = load_all(next(path for path in EXAMPLES if path.stem == "article-recipe").read_text())
    spec = parse(document).spec
    t, lora = spec.training, spec.method.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout, lora.bias) == (16, 32, 0.05, "none")
    assert lora.target_modules == ("q_proj", "v_proj")
    ranks = spec.distribution.nodes * spec.distribution.processes_per_node
    assert (t.micro_batch_size, t.global_batch_size // (4 * ranks)) == (4, 2)  # batch 4, accumulation 2
    assert (t.epochs, t.learning_rate, t.weight_decay) == (3, 2e-4, 0.001)
    assert (t.scheduler, t.warmup_ratio, t.max_grad_norm, t.optimizer) == ("constant", 0.03, 0.3, "adamw")
    assert (t.group_by_length, spec.dataset.packing) == (True, False)
    assert (t.eval_every_steps, spec.checkpoint.every, t.keep_best) == (500, 500, True)
    assert t.early_stopping is not None
    assert spec.dataset.validation is not None
    assert spec.dataset.test is not None


def test_the_first_job_needs_neither_object_storage_nor_a_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _read("first-job.yaml")
    assert "s3://" not in text
    assert "credentialsRef" not in text
    (job,), (claim,) = load_all(text), load_all(_read("first-job-claim.yaml"))
    assert parse(job).spec.output.uri == f"pvc://{claim['metadata']['name']}/result"
    rows = tmp_path / "rows.jsonl"  # the keys of the data set that it names
    row = {"instruction": "Name a fish", "context": "Fish or not: tope, rope", "response": "Tope", "category": "x"}
    rows.write_text(json.dumps(row) + "\n" + json.dumps({**row, "instruction": "Name another", "context": ""}) + "\n")
    assert main(["validate", str(_EXAMPLES / "first-job.yaml"), "--data", str(rows)]) == 0
    assert "alpaca (jsonl)" in capsys.readouterr().out


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
