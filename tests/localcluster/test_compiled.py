"""Go's cache is in memory only while programs are built, and only if there is plenty of memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localcluster.compiled import go_cache_in_memory

_GIB = 1 << 30


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GOCACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "disk"))


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


def test_builds_at_the_same_time_share_the_cache_and_the_last_one_removes_it(shared: Path) -> None:
    with go_cache_in_memory(shared, 20 * _GIB):
        folder = Path(os.environ.pop("GOCACHE"))  # another process wouldn't have the variable
        assert folder.parent == shared
        (folder / "compiled").write_text("x")
        with go_cache_in_memory(shared, 0):
            assert os.environ["GOCACHE"] == str(folder)
        assert (folder / "compiled").exists()
    assert list(shared.iterdir()) == []
    assert "GOCACHE" not in os.environ


@pytest.mark.parametrize(("available", "own"), [(14 * _GIB, None), (20 * _GIB, "/somebody/elses")])
def test_the_disk_is_used_with_little_memory_or_if_the_variable_is_set(
    shared: Path, monkeypatch: pytest.MonkeyPatch, available: int, own: str | None
) -> None:
    if own:
        monkeypatch.setenv("GOCACHE", own)
    with go_cache_in_memory(shared, available):
        assert os.environ.get("GOCACHE") == own
        assert list(shared.iterdir()) == []


def test_an_interrupted_build_keeps_what_it_has_compiled(shared: Path, tmp_path: Path) -> None:
    def build() -> None:
        with go_cache_in_memory(shared, 20 * _GIB):
            Path(os.environ["GOCACHE"], "00").mkdir()
            Path(os.environ["GOCACHE"], "00", "compiled").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert (tmp_path / "disk" / "go-build" / "00" / "compiled").read_text() == "x"
    assert list(shared.iterdir()) == []
