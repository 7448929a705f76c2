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


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
