"""Every example is a test: it is read by the real parser, as kubectl would read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.resource import parse
from finetune_api.yaml import load_all

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_job(path: Path) -> None:
    (document,) = load_all(path.read_text())
    job = parse(document)
    assert job.spec.distribution.nodes >= 1
    assert len(job.metadata.name) <= 50


def test_the_article_recipe_is_what_the_guides_say() -> None:
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


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
