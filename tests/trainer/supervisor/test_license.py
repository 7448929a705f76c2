"""The license of a base model is read in all its notations and shown, and a license that isn't
allowed is refused before training starts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from finetune_api.messages.run import ModelConfig
from finetune_trainer import license
from trainer.support import supervisor_process
from trainer.support.supervisor_process import JobSetup

_APACHE = "---\nlanguage: en\nlicense: Apache-2.0\n---\n# A model\n"


@pytest.fixture
def setup(tmp_path: Path) -> JobSetup:
    return JobSetup(tmp_path).write_inputs()


@pytest.mark.parametrize(
    ("readme", "config", "expected"),
    [
        (_APACHE, {}, "apache-2.0"),
        (_APACHE.replace("\n", "\r\n"), {}, "apache-2.0"),
        ("---\nlicense: other\nlicense_name: Gemma\n---\n", {}, "gemma"),
        ("---\nlicense: other\n---\n", {}, "other"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}, "mit and apache-2.0"),
        ("# no front matter\nlicense: mit\n", {"license": "MIT"}, "mit"),
        ("---\nlicense: mit\n", {}, "unknown"),
        ("---\n{broken: [yaml\n---\n", {}, "unknown"),
        ("---\n- a list\n---\n", {}, "unknown"),
        ("---\nlicense: 7\n---\n", {"license": ["mit"]}, "mit"),
        ("", {}, "unknown"),
    ],
)
def test_a_license_is_read_from_the_places_where_hubs_store_it(
    readme: str, config: dict[str, Any], expected: str
) -> None:
    assert license.of(readme, config) == expected


def _with_allowed_licenses(setup: JobSetup, job: tuple[str, ...] = (), operator: tuple[str, ...] = ()) -> JobSetup:
    location = supervisor_process.location(f"file://{setup.model}")
    return setup.with_changes(model=ModelConfig(location=location, allowed_licenses=job, operator_licenses=operator))


def test_an_allowed_license_is_shown_and_recorded(setup: JobSetup) -> None:
    (setup.model / "README.md").write_text(_APACHE)
    ended = supervisor_process.supervise(_with_allowed_licenses(setup, job=("Apache-2.0", "mit")).run(), setup.folder)
    assert ended.code == 0, ended.output
    assert ended.last.model is not None
    assert ended.last.model.license == "apache-2.0"
    assert supervisor_process.manifest(setup.output).provenance["model"]["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("readme", "allowed", "message"),
    [
        (_APACHE, {"job": ("mit",)}, "has the license apache-2.0, and model.allowedLicenses allows only mit"),
        (_APACHE, {"job": ("apache-2.0",), "operator": ("mit", "bsd")}, "and the operator allows only mit, bsd"),
        ("", {"operator": ("mit",)}, "names no license, and the operator allows only mit"),
    ],
)
def test_another_license_is_refused_in_preflight(
    readme: str, allowed: dict[str, tuple[str, ...]], message: str, setup: JobSetup
) -> None:
    (setup.model / "README.md").write_text(readme)
    ended = supervisor_process.start(
        _with_allowed_licenses(setup, **allowed).run(), setup.folder, command="preflight"
    ).wait()
    assert (ended.code, ended.last.reason) == (66, "LicenceRefused")
    assert message in ended.last.message
    assert not any(path.is_file() for path in setup.output.rglob("*"))


def test_cards_end_with_the_origin_of_the_result(tmp_path: Path) -> None:
    from finetune_trainer.supervisor import provenance

    for folder in (tmp_path, tmp_path / "merged"):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text("# A model\n")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"a")
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"b")
    origin = {
        "model": {"uri": "hf://org/base", "revision": "abc", "digest": "sha256:1"},
        "data": {"train": {"uri": "s3://d/t.jsonl", "digest": "sha256:2", "bytes": 1}},
        "image": "trainer:1",
    }
    provenance.add_to_cards(tmp_path, origin)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# A model\n\n## Origin\n")
    assert "| base model hf://org/base | abc sha256:1 |" in card
    assert "| train rows | sha256:2 |" in card
    assert f"| adapter_model.safetensors | sha256:{hashlib.sha256(b'a').hexdigest()} |" in card
    assert hashlib.sha256(b"b").hexdigest() in (tmp_path / "merged" / "README.md").read_text()
