"""Which files of a model's folder are downloaded, and which folders are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune_trainer.errors import RunError
from finetune_trainer.storage.base import FileInfo
from finetune_trainer.supervisor import download, preflight
from trainer.support import supervisor_process
from trainer.support.supervisor_process import JobSetup

GOOD = ("config.json", "tokenizer.json", "model.safetensors")

MODELS: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "ModelNotFound"),
    "no configuration": (GOOD[1:], "ModelInvalid"),
    "no weights": (GOOD[:2], "ModelInvalid"),
    "pickles only": ((*GOOD[:2], "pytorch_model.bin"), "ModelInvalid"),
    "no tokenizer": ((GOOD[0], GOOD[2]), "ModelInvalid"),
    "weights in a sub-folder": ((*GOOD[:2], "onnx/model.safetensors"), "ModelInvalid"),
}


def entries(*paths: str) -> tuple[FileInfo, ...]:
    return tuple(FileInfo(path, 1) for path in paths)


@pytest.mark.parametrize(("paths", "reason"), MODELS.values(), ids=MODELS)
def test_a_folder_without_a_safe_model_is_refused(paths: tuple[str, ...], reason: str) -> None:
    with pytest.raises(RunError) as refused:
        download.model_files(entries(*paths), "s3://m/x")
    assert refused.value.reason == reason
    assert "s3://m/x" in refused.value.message


def test_only_safe_and_useful_files_of_a_model_are_downloaded() -> None:
    more = ("chat_template.jinja", "pytorch_model.bin", "modeling_x.py", "original/params.json", "README.md", "a.gguf")
    weights, others = download.model_files(entries(*GOOD, *more), "x")
    assert [entry.path for entry in weights] == ["model.safetensors"]
    assert {entry.path for entry in others} == {*GOOD[:2], "chat_template.jinja", "README.md"}  # names the license


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ("adapter_config.json", "adapter_model.safetensors"),
            "is an adapter (adapter_config.json without config.json)",
        ),
        (
            ("README.md", "model-Q4_K_M.gguf"),
            "has model-Q4_K_M.gguf, which is a format for inference; use the folder of",
        ),
        (("config.json", "tokenizer.json", "model-Q8_0.gguf"), "has model-Q8_0.gguf, which is a format for inference"),
        (("params.json", "consolidated.00.pth"), "in the format of its publisher's own code; use its folder in"),
        (("model_index.json", "unet/config.json"), "is a pipeline of Diffusers (model_index.json), which generates no"),
    ],
    ids=["an adapter", "GGUF", "GGUF with a configuration", "Llama's own format", "Diffusers"],
)
def test_a_model_in_another_format_is_named(paths: tuple[str, ...], message: str) -> None:
    with pytest.raises(RunError, match=re.escape(message)) as refused:
        download.model_files(entries(*paths), "s3://m/x")
    assert refused.value.reason == "ModelInvalid"
    assert "; use" in refused.value.message


_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_INDEX = json.dumps({"weight_map": {"a": _SHARDS[0], "b": _SHARDS[1], "c": _SHARDS[0]}}).encode()


@pytest.mark.parametrize(
    ("files", "index", "expected"),
    [
        (("model.safetensors", "consolidated.safetensors"), None, ("model.safetensors",)),
        ((*_SHARDS, "consolidated.safetensors", "model.safetensors.index.json"), _INDEX, _SHARDS),
        (("model.safetensors", *_SHARDS, "model.safetensors.index.json"), _INDEX, ("model.safetensors",)),
        ((*_SHARDS, "model.fp16-00001-of-00001.safetensors", "model.safetensors.index.json"), _INDEX, _SHARDS),
    ],
)
def test_no_weights_are_downloaded_twice(
    files: tuple[str, ...], index: bytes | None, expected: tuple[str, ...]
) -> None:
    """Mistral's repositories hold their weights twice: 27 GiB, of which Transformers reads half."""
    weights, others = download.model_files(entries(*GOOD[:2], *files), "x", index)
    assert tuple(entry.path for entry in weights) == expected
    assert not any(entry.path.endswith(".safetensors") for entry in others)


@pytest.mark.parametrize(
    ("files", "index", "message"),
    [
        ((_SHARDS[0], "model.safetensors.index.json"), _INDEX, f"lacks {_SHARDS[1]}, one of 2 weight files"),
        ((*_SHARDS, "model.safetensors.index.json"), None, "model.safetensors.index.json isn't JSON"),
        ((*_SHARDS, "model.safetensors.index.json"), b"{}", "model.safetensors.index.json has no weight_map"),
        ((*_SHARDS, "model.safetensors.index.json"), b"[1", "model.safetensors.index.json isn't JSON"),
        (("consolidated.safetensors",), None, "has consolidated.safetensors, but Transformers reads model.safetensors"),
    ],
)
def test_weights_that_transformers_would_not_read_are_refused(
    files: tuple[str, ...], index: bytes | None, message: str
) -> None:
    with pytest.raises(RunError, match=re.escape(message)) as refused:
        download.model_files(entries(*GOOD[:2], *files), "s3://m/x", index)
    assert refused.value.reason == "ModelInvalid"


def test_a_model_on_a_volume_takes_no_scratch_disk(tmp_path: Path) -> None:
    setup = JobSetup(tmp_path).write_inputs()
    run = setup.run().model_copy(update={"scratch_bytes": 500})  # its files have more
    assert supervisor_process.supervise(run, setup.folder).code == 0


def _facts(total: int, *, on_scratch: bool = True) -> download.ModelFacts:
    return download.ModelFacts(None, "", 0, total_bytes=total, on_scratch=on_scratch)


@pytest.mark.parametrize(
    ("changes", "facts", "data", "field"),
    [
        ({"scratch_bytes": 100}, _facts(80), 30, "resources.scratch"),
        ({"scratch_bytes": 100}, _facts(80), 20, None),
        ({"scratch_bytes": 100, "merge": True}, _facts(60), 0, "resources.scratch"),
        ({"scratch_bytes": 100, "method": "full", "lora": None}, _facts(60), 0, "resources.scratch"),
        ({"scratch_bytes": 100, "method": "full", "lora": None}, _facts(60, on_scratch=False), 0, None),
        ({"scratch_bytes": 100, "auto_scratch": True}, _facts(800), 30, None),
        ({"memory_bytes": 100}, _facts(202), 0, "resources.memory"),
        ({"memory_bytes": 100}, _facts(200), 0, None),
        ({"memory_bytes": 100, "auto_memory": True}, _facts(202), 0, None),
    ],
    ids=[
        "rows too", "all fits", "a merged model", "a whole model as the result", "a model on a volume",
        "disk that grows with the model", "memory", "enough memory", "memory that grows with the model",
    ],
)  # fmt: skip
def test_room_that_cannot_suffice_is_refused_before_gpus_are_allocated(
    tmp_path: Path, changes: dict[str, object], facts: download.ModelFacts, data: int, field: str | None
) -> None:
    run = JobSetup(tmp_path).run()
    run = run.model_copy(update={"world": run.world.model_copy(update={"device": "cuda"}), **changes})
    if field is None:
        preflight.check_room(run, facts, data)
        return
    with pytest.raises(RunError, match=f"{field} is .*; raise it") as refused:
        preflight.check_room(run, facts, data)
    assert refused.value.reason == "InvalidConfig"
