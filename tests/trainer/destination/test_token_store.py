"""The tokens of a preflight reach the pods of every attempt, and are never a reason to fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_api.messages.run import DataConfig, RunConfig, S3Config, WorldConfig
from finetune_trainer import manifest
from finetune_trainer.data import pipeline, preparation, token_cache
from finetune_trainer.destination import token_store
from finetune_trainer.destination.signing import Signer
from finetune_trainer.destination.token_store import Origin
from finetune_trainer.paths import Paths
from finetune_trainer.storage import schemes
from finetune_trainer.storage.base import Storage
from finetune_trainer.storage.local import LocalStorage
from finetune_trainer.storage.schemes import Access
from finetune_trainer.supervisor import download, preflight, upload
from testkit.tiny_models import tiny_llama
from trainer.support import supervisor_process
from trainer.support.supervisor_process import JobSetup

_ACCESS = Access(S3Config(), {})


def _ignore(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> JobSetup:
    setup = JobSetup(tmp_path_factory.mktemp("job")).write_inputs()
    shutil.rmtree(setup.model)
    tiny_llama(setup.model)
    data = DataConfig(train=supervisor_process.location(f"file://{setup.train}"), max_sequence_length=64)
    return setup.with_changes(data=data, world=WorldConfig(processes_per_node=1, device="cuda"))


@pytest.fixture(scope="module")
def output_of_preflight(setup: JobSetup) -> Path:
    """A copy of the output after a preflight, whose few tokens count as many."""
    run = setup.run(scratch="preflight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_store, "MIN_BYTES", 1)
        preflight.check(run, Paths(Path(run.scratch)), _ACCESS, preflight.Activity(_ignore))
    return Path(shutil.copytree(setup.output, setup.folder / "output-of-preflight"))


@pytest.fixture
def stored(setup: JobSetup, output_of_preflight: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The output after the preflight, and nothing of another test."""
    monkeypatch.setattr(token_store, "MIN_BYTES", 1)
    for folder in (setup.output, setup.folder / "another-node", setup.folder / "second-preflight"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(output_of_preflight, setup.output)
    setup.train.write_text(supervisor_process.ROWS)
    return schemes.open_folder(setup.run().output, "output", _ACCESS)


def _fetched(run: RunConfig, storage: Storage) -> tuple[Paths, list[str]]:
    """Does what the supervisor does before it starts the ranks. Returns its lines about tokens."""
    lines: list[str] = []
    paths = Paths(Path(run.scratch))
    download.data(run, paths, _ACCESS, _ignore)
    download.model(run, paths, _ACCESS, _ignore)
    preflight.fetch_tokens(run, paths, storage, lines.append)
    return paths, lines


def test_an_attempt_computes_no_tokens_that_the_preflight_has_stored(
    setup: JobSetup, stored: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = setup.run(attempt=2, scratch="another-node")
    paths, lines = _fetched(run, stored)
    assert [line.partition(":")[0] for line in lines] == ["the tokens of the preflight are used"]

    def fail(*_: object) -> None:
        raise AssertionError("the rows are rendered again")

    monkeypatch.setattr(preparation, "prepare", fail)
    inputs = pipeline.Inputs.of_run(run, paths)
    ours = pipeline.prepare(inputs, pipeline.load_renderer(paths.model, run.data, run.added_tokens)).rows["train"]
    monkeypatch.undo()
    shutil.rmtree(paths.token_cache)
    theirs = pipeline.prepare(inputs, pipeline.load_renderer(paths.model, run.data, run.added_tokens)).rows["train"]
    assert np.array_equal(ours.lengths, theirs.lengths)
    assert not any(path.is_symlink() for path in paths.token_cache.rglob("*"))


def _change_a_file(folder: Path) -> None:
    (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:-4] + b"\1\2\3\4")


def _lose_a_file(folder: Path) -> None:
    (folder / "ids.npy").unlink()


def _of_another_job(folder: Path) -> None:
    marker = folder / "complete.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "job": "uid-2"}))


def _lead_out(folder: Path) -> None:
    marker = folder / "complete.json"
    body = json.loads(marker.read_text())
    body["files"]["../../../escaped"] = body["files"].pop("facts.json")
    marker.write_text(json.dumps(body))


def _cut_off(folder: Path) -> None:
    marker = folder / "complete.json"
    marker.write_bytes(marker.read_bytes()[:-9])


def _without_marker(folder: Path) -> None:
    (folder / "complete.json").unlink()


_DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (_change_a_file, "ids.npy has changed"),
    (_lose_a_file, "can't be used"),
    (_lead_out, "is no file name"),
    (_cut_off, "can't be used"),
    (_of_another_job, "they are another job's"),
    (_without_marker, ""),
]


@pytest.mark.parametrize(("damage", "reason"), _DAMAGES, ids=lambda value: getattr(value, "__name__", None))
def test_tokens_that_cannot_be_used_are_computed_again(
    setup: JobSetup, stored: Storage, damage: Callable[[Path], None], reason: str
) -> None:
    (folder,) = (setup.output / token_store.FOLDER).iterdir()
    damage(folder)
    run = setup.run(attempt=2, scratch="another-node")
    paths, lines = _fetched(run, stored)
    assert len(lines) == bool(reason)
    assert not lines or reason in lines[0]
    assert not paths.token_cache.exists() or not list(paths.token_cache.iterdir())
    inputs = pipeline.Inputs.of_run(run, paths)
    pipeline.prepare(inputs, pipeline.load_renderer(paths.model, run.data, run.added_tokens))
    assert len(token_cache.load(inputs.cache, inputs.cache_names["train"])) == 8


_LOCAL_NAME = "0" * 16


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tokens on a preflight's disk; these few count as many."""
    monkeypatch.setattr(token_store, "MIN_BYTES", 1)
    folder = tmp_path / "preflight" / _LOCAL_NAME
    folder.mkdir(parents=True)
    (folder / "ids.npy").write_bytes(b"tokens" * 9)
    (folder / "facts.json").write_text("{}")
    return folder


def _used(folder: Path, origin: Origin) -> tuple[bool, list[str]]:
    """Whether an attempt uses the tokens in the output `folder`, and its lines about them."""
    lines: list[str] = []
    target = folder.parent / "attempt" / _LOCAL_NAME
    shutil.rmtree(target.parent, ignore_errors=True)
    storage = LocalStorage(folder, role="output", display="out")
    used = token_store.download(storage, target, origin, lines.append)
    assert target.exists() is used
    return used, lines


def _unsigned(folder: Path, body: dict[str, Any]) -> None:
    del body["signature"]


def _exchanged(folder: Path, body: dict[str, Any]) -> None:
    _change_a_file(folder)
    body["files"]["ids.npy"]["sha256"] = manifest.of_file(folder / "ids.npy")


def _signed_by_a_stranger(folder: Path, body: dict[str, Any]) -> None:
    _exchanged(folder, body)
    content = {"job": body["job"], "files": body["files"], "folder": folder.name}
    body["signature"] = Signer().signature(b"tokens " + json.dumps(content, sort_keys=True).encode())


def _of_other_rows(folder: Path, body: dict[str, Any]) -> None:
    content = {"job": body["job"], "files": body["files"], "folder": "1" * 16}
    body["signature"] = _SIGNER.signature(b"tokens " + json.dumps(content, sort_keys=True).encode())


_SIGNER = Signer()


@pytest.mark.parametrize("forge", [_unsigned, _exchanged, _signed_by_a_stranger, _of_other_rows])
def test_forged_tokens_are_computed_again_with_a_word_in_the_log(
    tokens: Path, tmp_path: Path, forge: Callable[[Path, dict[str, Any]], None]
) -> None:
    storage = LocalStorage(tmp_path / "out", role="output", display="out")
    origin = Origin("uid-1", (_SIGNER.public,))
    assert token_store.upload(storage, tokens, origin, _SIGNER, _ignore)
    assert _used(tmp_path / "out", origin)[0]
    folder = tmp_path / "out" / token_store.FOLDER / _LOCAL_NAME
    marker = folder / "complete.json"
    body = json.loads(marker.read_text())
    forge(folder, body)
    marker.write_text(json.dumps(body))
    refusal = "the stored tokens can't be used, so they are computed again: no preflight of this job has signed them"
    assert _used(tmp_path / "out", origin) == (False, [refusal])
    # Another preflight replaces them, and its key counts.
    again = Signer()
    assert token_store.upload(storage, tokens, origin, again, _ignore)
    assert _used(tmp_path / "out", Origin("uid-1", (_SIGNER.public, again.public)))[0]


def test_tokens_of_an_earlier_preflight_are_signed_again_and_not_sent_again(tokens: Path, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "out", role="output", display="out")
    first, second = Signer(), Signer()
    token_store.upload(storage, tokens, Origin("uid-1", ()), first, _ignore)
    stored = tmp_path / "out" / token_store.FOLDER / _LOCAL_NAME / "ids.npy"
    sent = stored.stat().st_ino
    token_store.upload(storage, tokens, Origin("uid-1", (first.public,)), second, _ignore)
    assert stored.stat().st_ino == sent
    for keys, used in (((second.public,), True), ((first.public,), False), ((), False), (None, True)):
        assert _used(tmp_path / "out", Origin("uid-1", keys))[0] is used
    assert not _used(tmp_path / "out", Origin("uid-2", (second.public,)))[0]


def test_other_rows_have_other_tokens(setup: JobSetup, stored: Storage) -> None:
    setup.train.write_text(supervisor_process.ROWS.replace("question", "query"))
    paths, lines = _fetched(setup.run(attempt=2, scratch="another-node"), stored)
    assert not lines
    assert not paths.token_cache.exists()


def test_few_tokens_are_not_stored_and_all_are_deleted_with_the_checkpoints(
    setup: JobSetup, stored: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stored.list(token_store.FOLDER)
    upload.remove_checkpoints(stored, setup.run().job)
    assert not list(setup.output.rglob("*"))
    monkeypatch.undo()
    run = setup.run(scratch="second-preflight")
    preflight.check(run, Paths(Path(run.scratch)), _ACCESS, preflight.Activity(_ignore))
    assert not stored.list(token_store.FOLDER)
