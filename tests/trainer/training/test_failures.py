"""Failures in the ranks are reported with their reason, and with the number of the row or the name
of the field."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from finetune_api.messages import events
from finetune_api.reasons import REASONS
from finetune_trainer.errors import RunError, run_error_from
from finetune_trainer.model import loading
from testkit.rows import pairs
from testkit.tiny_models import VOCABULARY, pickle_only
from trainer.support.checkpoints import newest_complete
from trainer.support.rank_runs import prepare


def _refused(tmp_path: Path, base: Path, rows: Any, **options: Any) -> events.ErrorEvent:
    ended = prepare(tmp_path / "job", base, rows, **options).finish()
    assert ended.codes == (REASONS[ended.failure.reason].exit_code,)
    assert not ended.events(events.StepEvent)
    return ended.failure


def test_a_broken_line_is_reported_by_its_number(tmp_path: Path, models: dict[str, Path]) -> None:
    rows = [json.dumps(row) for row in pairs(5)]
    error = _refused(tmp_path, models["llama"], "\n".join([*rows[:2], '{"prompt": "x", ', *rows[2:]]))
    assert error.reason == "DatasetInvalid"
    assert "row 3: isn't JSON" in error.message
    assert "dataset.onInvalid: drop" in error.message


def test_a_loss_that_isnt_finite_stops_all_ranks_before_the_step_and_names_the_rows(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    """Bug 23: a loss that isn't finite is hidden from the log while the weights are destroyed.

    The embedding of one token is infinite: only the row with that token is poisoned.
    """
    base = tmp_path / "base"
    shutil.copytree(models["qwen2"], base)
    weights = load_file(base / "model.safetensors")
    renderer_ids = _ids(base, "@")
    weights["model.embed_tokens.weight"][renderer_ids] = float("inf")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    rows = pairs(40)
    rows[29] = {"prompt": "@", "completion": "poison"}
    job = prepare(tmp_path / "job", base, rows, world=2, training={"max_steps": 5, "max_skipped_steps": 0}, every=1)
    ended = job.finish()
    assert set(ended.codes) == {71}
    assert ended.failure.reason == "NonFiniteLoss"
    assert "30" in ended.failure.message.split("rows ")[1]
    done = len(ended.events(events.StepEvent))
    newest = newest_complete(job.paths.checkpoints)
    assert done == (int(newest.name[5:]) if newest else 0)


def _ids(base: Path, text: str) -> int:
    from finetune_trainer.data import tokenizer

    return int(tokenizer.load(base)(text, add_special_tokens=False).input_ids[0])


def test_an_unknown_target_module_is_reported_with_those_that_exist(tmp_path: Path, models: dict[str, Path]) -> None:
    error = _refused(tmp_path, models["llama"], pairs(5), lora={"target_modules": ("q_proj", "nope")})
    assert error.reason == "InvalidConfig"
    assert "no linear layer called nope" in error.message
    assert "down_proj" in error.message


def test_a_padding_token_that_the_model_has_no_embedding_for_isnt_used(tmp_path: Path, models: dict[str, Path]) -> None:
    from transformers import PreTrainedTokenizerFast

    base = shutil.copytree(models["llama"], tmp_path / "base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_tokens([f"<unused {number}>" for number in range(VOCABULARY - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    assert tokenizer.pad_token_id == VOCABULARY
    rows = [*pairs(3), {"prompt": "x", "completion": "a longer answer than the others have"}]
    options = {"data": {"packing": False}, "training": {"max_steps": 1, "micro_batch_size": 4, "global_batch_size": 4}}
    assert len(prepare(tmp_path / "job", base, rows, **options).finish().check().losses) == 1


def test_a_lost_peer_ends_the_others_soon(tmp_path: Path, models: dict[str, Path]) -> None:
    ranks = prepare(tmp_path / "job", models["llama"], pairs(40), world=2, training={"max_steps": 100000}).start()
    ranks.wait_for_events(events.StepEvent, 2)
    ranks.processes[1].send_signal(signal.SIGKILL)
    ended = ranks.wait(60)
    assert ended.codes == (75, -9)
    assert ended.failure.reason == "PeerLost"


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"pytorch_model\.bin, which are pickles and never loaded") as refused:
        loading.check(pickle_only(tmp_path))
    assert refused.value.reason == "ModelInvalid"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda base: (base / "config.json").unlink(), "no config.json", id="no config"),
        pytest.param(lambda base: (base / "model.safetensors").unlink(), "has no weights", id="no weights"),
        pytest.param(
            lambda base: (base / "model.safetensors").write_bytes(b"torn"), "has only 4 bytes", id="torn weights"
        ),
        pytest.param(
            lambda base: (base / "config.json").write_text('{"model_type": "unheard-of"}'),
            "the model_type 'unheard-of'",
            id="kind",
        ),
        pytest.param(
            lambda base: save_file(
                {k: v for k, v in load_file(base / "model.safetensors").items() if "layers.1" not in k},
                base / "model.safetensors",
                metadata={"format": "pt"},
            ),
            "weights lack",
            id="lacking",
        ),
    ],
)
def test_a_folder_that_isnt_a_model_is_refused(
    spoil: Any, message: str, tmp_path: Path, models: dict[str, Path]
) -> None:
    import torch

    base = tmp_path / "base"
    shutil.copytree(models["llama"], base)
    spoil(base)
    with pytest.raises(RunError, match=message) as refused:
        loading.load(base, dtype=torch.float32, longest=64)
    assert refused.value.reason == "ModelInvalid"


def test_rows_longer_than_the_models_positions_are_refused(models: dict[str, Path]) -> None:
    import torch

    with pytest.raises(RunError, match="a row of 4096 tokens, but the model has 512 positions"):
        loading.load(models["llama"], dtype=torch.float32, longest=4096)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "OutOfMemory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "OutOfMemory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "OutOfMemory"),
        (OSError(28, "No space left on device"), "DiskFull"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:4"), "PeerLost"),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited"), "PeerLost"),
        (ValueError("anything else"), "TrainingError"),
        (KeyError("connection closed by peer"), "TrainingError"),
        (ValueError("'a heartbeat, out of memory' isn't an activation"), "TrainingError"),
        (RunError("DatasetInvalid", "row 3"), "DatasetInvalid"),
    ],
)
def test_an_exception_is_reported_with_its_reason(error: Exception, reason: str) -> None:
    assert run_error_from(error).reason == reason
