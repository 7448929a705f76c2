"""YAML is read as kubectl reads it: our loader is compared with the real kubectl."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import localcluster_tool
from finetune_api.resource import parse
from finetune_api.yaml import load, load_all, plain

PLAIN = """
2e-4 2E-4 1e3 1. .5 0x1F 017 0o17 08 0b11 1_000 +1 -1 1.0 1e-5 -.5e2 0.30 1__0 0x_1 -0x1F 1e+3 12e03 1.5_0 0 -0
9223372036854775807 18446744073709551615 1e-400 yes No on OFF y n ~ null Null true True tRUE 2024-01-01 1:30 << =
1e400x 0xZZ 1.2.3 . +. e5 _1 0x 128Gi 500m
"""
WORDS = PLAIN.split()

HEAD = "apiVersion: example.com/v1\nkind: Thing\nmetadata: {name: a}\n"
DOCUMENTS = {
    **{word: f"{HEAD}value: {word}\n" for word in WORDS},
    "keys": f"{HEAD}value: {{1: a, true: b, 1.5: c, no: d, 2e-4: e}}\n",
    "anchors": f"{HEAD}base: &b {{p: 1, q: 2}}\nvalue: {{<<: *b, q: 3}}\n",
    "tags": f"{HEAD}value: [!!str 1, !!int '4', !!float 3, !!binary aGVsbG8=]\n",
    "quotes": f"{HEAD}value: ['2e-4', \"yes\", '']\n",
    "blocks": f"{HEAD}value: |\n  two\n  lines\nother: >-\n  one\n  line\n",
    "empty": f"{HEAD}value:\n",
}


def by_kubectl(text: str, folder: Path) -> Any:
    """Return how kubectl parses a file, using a command that contacts no server."""
    file = folder / "thing.yaml"
    file.write_text(text)
    command = [localcluster_tool("kubectl"), "label", "--local", "-f", str(file), "a=b", "-o", "json"]
    value = json.loads(subprocess.run(command, check=True, capture_output=True).stdout, parse_int=_go_number)
    del value["metadata"]["labels"]
    return value


def _go_number(digits: str) -> int | float:
    """Return a number as Go's JSON decodes it: beyond 64 bits it becomes a float."""
    return int(digits) if abs(int(digits)) < 2**63 else float(digits)


@pytest.mark.cluster
@pytest.mark.parametrize("name", DOCUMENTS)
def test_our_loader_reads_what_kubectl_reads(name: str, tmp_path: Path) -> None:
    theirs, ours = by_kubectl(DOCUMENTS[name], tmp_path), load(DOCUMENTS[name])
    assert ours == theirs
    assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)  # 1, 1.0 and true differ there


@pytest.mark.parametrize(
    ("word", "value"),
    [("2e-4", 2e-4), ("2E-4", 2e-4), ("017", 15), ("yes", True), ("2.0", 2), ("2024-01-01", "2024-01-01"), ("~", None)],
)
def test_a_plain_scalar_has_the_value_that_kubectl_gives_it(word: str, value: Any) -> None:
    assert plain(word) == value
    assert type(plain(word)) is type(value)


def test_a_learning_rate_with_an_exponent_is_a_number() -> None:
    text = """
    apiVersion: finetune-operator.io/v1alpha1
    kind: FineTuneJob
    metadata: {name: a}
    spec:
      model: {uri: hf://org/model}
      dataset: {uri: s3://data/train.jsonl}
      method: {type: lora, lora: {}}
      training: {learningRate: 2e-4}
      output: {uri: s3://models/a}
    """
    assert parse(load(text)).spec.training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "'a' is set twice"),
        ("a: .nan", ".nan is not a number that Kubernetes can store"),
        ("a: 1e999", "too large"),
        ("a: [1", "expected"),
    ],
)
def test_what_kubernetes_cannot_store_is_refused_with_its_position(text: str, message: str) -> None:
    with pytest.raises(yaml.YAMLError, match=message) as refusal:
        load(text)
    assert "line" in str(refusal.value)


def test_empty_documents_are_skipped_and_one_document_is_expected() -> None:
    assert load_all("---\n---\na: 1\n---\n") == ({"a": 1},)
    with pytest.raises(ValueError, match="2 documents"):
        load("a: 1\n---\nb: 2")
