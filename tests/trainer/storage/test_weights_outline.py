"""Of a weight file only the header is read, from each kind of store; a file that has none is
refused by its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune_api.messages.run import ModelConfig, S3Config
from finetune_trainer.errors import RunError
from finetune_trainer.storage import weights_outline
from finetune_trainer.storage.base import Storage
from finetune_trainer.storage.schemes import Access, open_folder
from testkit.hub_server import Repository, running_hub
from testkit.s3_server import running_s3
from testkit.tiny_models import tiny_llama
from trainer.support import supervisor_process
from trainer.support.supervisor_process import JobSetup

_NAME = "model.safetensors"
_ACCESS = Access(S3Config(allow_http=True), {}, retries=1, retry_seconds=10)


@contextmanager
def _local(model: Path, folder: Path) -> Iterator[Storage]:
    yield open_folder(supervisor_process.location(f"file://{model}"), "model", _ACCESS)


@contextmanager
def _s3(model: Path, folder: Path) -> Iterator[Storage]:
    with running_s3(folder / "s3", ("models",)) as server:
        shutil.copytree(model, server.folder / "models" / "tiny")
        keys = supervisor_process.secret(folder / "keys", server.environment())
        yield open_folder(supervisor_process.location("s3://models/tiny", keys), "model", _ACCESS)


@pytest.mark.parametrize("opened", [_local, _s3], ids=["folder", "bucket"])
def test_an_outline_has_the_header_and_the_size_of_a_file_but_no_weights(
    opened: Callable[[Path, Path], AbstractContextManager[Storage]], tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "model")
    (model / "cut.safetensors").write_bytes((model / _NAME).read_bytes()[:-8])
    (model / "empty.safetensors").write_bytes(b"")
    target = tmp_path / _NAME
    target.symlink_to(model / _NAME)  # as a download from a volume leaves it
    original = (model / _NAME).read_bytes()
    with opened(model, tmp_path) as storage:
        entries = {entry.path: entry for entry in storage.list()}
        weights_outline.write(storage, entries[_NAME], target)
        assert storage.read_range(entries[_NAME], 10, 20) == (model / _NAME).read_bytes()[10:20]
        assert (
            storage.read_range(entries[_NAME], entries[_NAME].size - 3, entries[_NAME].size + 9)
            == ((model / _NAME).read_bytes()[-3:])
        )
        for name, problem in (("cut", "is cut off"), ("empty", "is empty")):
            with pytest.raises(RunError, match=rf"{name}\.safetensors {problem}") as refused:
                weights_outline.write(storage, entries[f"{name}.safetensors"], target.with_name(name))
            assert refused.value.reason == "ModelInvalid"
    assert (model / _NAME).read_bytes() == original
    assert target.stat().st_size == (model / _NAME).stat().st_size
    outline, weights = load_file(target), load_file(model / _NAME)
    assert {name: tensor.shape for name, tensor in outline.items()} == {n: t.shape for n, t in weights.items()}
    assert not any(tensor.any() for tensor in outline.values())


def test_preflight_builds_a_model_of_a_hub_from_its_header(tmp_path: Path) -> None:
    setup = JobSetup(tmp_path).write_inputs()
    shutil.rmtree(setup.model)
    tiny_llama(setup.model)
    with running_hub({"org/tiny": Repository(setup.model)}) as hub:
        model = ModelConfig(location=supervisor_process.location("hf://org/tiny"))
        run, home = setup.with_changes(model=model).run(), hub.environment(setup.folder / "home")
        ended = supervisor_process.supervise(run, setup.folder, command="preflight", environment=home)
    assert ended.code == 0, ended.output
    assert "trainable: " in ended.output
    assert not [request for request in hub.requests if request.startswith("HEAD") and _NAME in request]
