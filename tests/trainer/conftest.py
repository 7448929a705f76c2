"""Tiny models, written once a test run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from testkit.tiny_models import tiny_gpt2, tiny_llama, tiny_qwen2, tiny_t5
from trainer import forked


def pytest_collection_finish(session: pytest.Session) -> None:
    """The ranks' server imports for ten seconds: it begins while other folders' tests are run."""
    here = [Path(__file__).parent in item.path.parents for item in session.items]
    if any(here) and not here[0] and not session.config.option.collectonly:
        forked.begin()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family, without the dropout that some families bring along, so that runs can be compared."""
    root = tmp_path_factory.mktemp("models")
    builders = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2, "t5": tiny_t5}
    for name, build in builders.items():
        path = build(root / name) / "config.json"
        config = json.loads(path.read_text())
        still = {key: 0.0 for key in config if "drop" in key and isinstance(config[key], float)}
        path.write_text(json.dumps({**config, **still}))
    return {name: root / name for name in builders}
