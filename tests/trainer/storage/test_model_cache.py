"""Base models that pods share: real processes that download at the same time, and are killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.storage.base import FileInfo
from finetune_trainer.storage.model_cache import CachedModel, ModelCache, key_of

_PROGRAM = """
import hashlib, json, resource, sys, time
from pathlib import Path
from finetune_trainer.storage.base import FileInfo
from finetune_trainer.storage.model_cache import ModelCache
root, key, seconds, size, limit, linger = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
def download(entries, target):
    print("BEGIN", flush=True)
    digests = {}
    for entry in entries:
        with (target / entry.path).open("wb") as file:
            for _ in range(10):
                file.write(b"x" * (entry.size // 10))
                file.flush()
                time.sleep(seconds / 20)
        digests[entry.path] = hashlib.sha256((target / entry.path).read_bytes()).hexdigest()
    return digests
entries = (FileInfo("a.safetensors", int(size)), FileInfo("config.json", int(size)))
model = ModelCache(Path(root), 10**6, lambda line: print(line, flush=True)).fetch(key, entries, download)
print("model", json.dumps(model.digests if model else None), flush=True)
time.sleep(linger)
"""


def _start(
    root: Path, key: str = "k", *, seconds: float = 0, size: int = 1000, limit: int = 0, linger: float = 0
) -> subprocess.Popen[str]:
    arguments = [str(root), key, str(seconds), str(size), str(limit), str(linger)]
    return subprocess.Popen([sys.executable, "-c", _PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)


def _output(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    return output


def _model(output: str) -> Any:
    return json.loads(output.rpartition("model ")[2])


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_of_two_pods_one_downloads_and_the_other_waits(tmp_path: Path) -> None:
    first = _start(tmp_path, seconds=3)
    _wait_for(tmp_path / "partial" / "k" / "a.safetensors")
    second = _start(tmp_path)
    outputs = [_output(first), _output(second)]
    assert [output.count("BEGIN") for output in outputs] == [1, 0]
    assert "waiting for another pod, which has downloaded" in outputs[1]
    expected = hashlib.sha256(b"x" * 1000).hexdigest()
    assert [_model(output) for output in outputs] == [{"a.safetensors": expected, "config.json": expected}] * 2


def test_a_pod_that_is_killed_in_the_middle_leaves_nothing_that_counts(tmp_path: Path) -> None:
    killed = _start(tmp_path, seconds=60)
    _wait_for(tmp_path / "partial" / "k" / "a.safetensors")
    waiting = _start(tmp_path)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "models" / "k").exists()
    output = _output(waiting)
    assert output.count("BEGIN") == 1
    assert (tmp_path / "models" / "k" / "a.safetensors").stat().st_size == 1000
    assert _model(output) is not None
    assert not list((tmp_path / "partial").iterdir())


def test_a_file_that_was_changed_is_downloaded_again(tmp_path: Path) -> None:
    _output(_start(tmp_path))
    assert "BEGIN" not in _output(_start(tmp_path))
    file = tmp_path / "models" / "k" / "a.safetensors"
    file.write_bytes(b"y" * 1000)
    output = _output(_start(tmp_path))
    assert "a.safetensors in the model cache has changed" in output
    assert file.read_bytes() == b"x" * 1000


def test_the_model_that_was_used_longest_ago_makes_room_unless_it_is_in_use(tmp_path: Path) -> None:
    used = _start(tmp_path, "in-use", size=200_000, linger=60)
    _wait_for(tmp_path / "models" / "in-use")
    for key in ("old", "new"):
        _output(_start(tmp_path, key, size=100_000))
    _output(_start(tmp_path, "old", size=100_000))  # so that `new` is the one used longest ago
    for key, seconds in (("in-use", 1), ("new", 2), ("old", 3)):
        os.utime(tmp_path / "models" / key / ".complete.json", (seconds, seconds))
    output = _output(_start(tmp_path, "more", size=150_000))
    assert "deleted new from the model cache" in output
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["in-use", "more", "old"]
    used.kill()
    used.wait()


@pytest.mark.parametrize(
    ("size", "limit", "message"),
    [(600_000, 0, "the model has 0.0 GB, and of 0.0 GB"), (1000, 500, "File too large")],
    ids=["a model larger than the cache", "a volume that can't be written"],
)
def test_a_cache_that_cannot_take_a_model_is_left_out(tmp_path: Path, size: int, limit: int, message: str) -> None:
    output = _output(_start(tmp_path, size=size, limit=limit))
    assert "the model cache can't be used: " in output
    assert message in output
    assert "downloading to the scratch disk instead" in output
    assert _model(output) is None
    assert not list((tmp_path / "partial").glob("*")) if (tmp_path / "partial").exists() else True


def test_a_folder_that_is_no_folder_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert _model(_output(_start(tmp_path / "file"))) is None


def test_a_complete_model_is_used_without_locks_if_none_can_be_written(tmp_path: Path) -> None:
    _output(_start(tmp_path))
    for lock in (tmp_path / "locks").iterdir():
        lock.unlink()
    (tmp_path / "locks").rmdir()
    (tmp_path / "locks").write_text("")  # as on a read-only volume, no lock can be created
    output = _output(_start(tmp_path))
    assert "the model is in the cache" in output
    assert _model(output) is not None
    assert _model(_output(_start(tmp_path, "other"))) is None


def test_models_differ_by_uri_revision_and_files() -> None:
    entries = (FileInfo("a", 1, "e"), FileInfo("b", 2))
    keys = {
        key_of("hf://o/m", "r", entries),
        key_of("hf://o/other", "r", entries),
        key_of("hf://o/m", "s", entries),
        key_of("hf://o/m", "r", (FileInfo("a", 1, "f"), FileInfo("b", 2))),
    }
    assert len(keys) == 4
    assert key_of("hf://o/m", "r", entries) == key_of("hf://o/m", "r", entries[::-1])


def test_a_model_is_a_value(tmp_path: Path) -> None:
    reports: list[str] = []
    cache = ModelCache(tmp_path, 100, reports.append)

    def download(entries: tuple[FileInfo, ...], target: Path) -> dict[str, str]:
        (target / "a").write_bytes(b"1")
        return {"a": "digest"}

    first = cache.fetch("k", (FileInfo("a", 1),), download)
    assert (
        first
        == cache.fetch("k", (FileInfo("a", 1),), download)
        == CachedModel("k", tmp_path / "models" / "k", {"a": "digest"})
    )
    assert reports == [f"the model is in the cache, in {tmp_path}/models/k"]
