"""Tiny models, written once per test run, and a check that no test leaves a supervisor running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.support import forked_ranks, supervisor_process
from trainer.support.kernel_builds import kernel

__all__ = ["kernel"]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the ranks' server, which imports for ten seconds while other folders' tests run."""
    in_this_folder = [Path(__file__).parent in item.path.parents for item in session.items]
    if any(in_this_folder) and not in_this_folder[0] and not session.config.option.collectonly:
        forked_ranks.start_server()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the models' folders by family, without the dropout of some families, so that runs can
    be compared."""
    # PyTorch: the first process of pytest-xdist reads this file too, but runs no test.
    from testkit.tiny_models import tiny_gpt2, tiny_llama, tiny_qwen2, tiny_t5

    root = tmp_path_factory.mktemp("models")
    builders = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2, "t5": tiny_t5}
    for name, build in builders.items():
        path = build(root / name) / "config.json"
        config = json.loads(path.read_text())
        no_dropout = {key: 0.0 for key in config if "drop" in key and isinstance(config[key], float)}
        path.write_text(json.dumps({**config, **no_dropout}))
    return {name: root / name for name in builders}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    while supervisor_process.STARTED:
        process = supervisor_process.STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait()
