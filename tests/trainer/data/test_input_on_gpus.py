"""A batch reaches a GPU from pinned memory, without the host waiting, and its memory isn't used for
anything else before the copy is done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from finetune_trainer.data import token_cache
from finetune_trainer.data.batching import packed_layout
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.data.batching.transfer import to_device
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.preparation import ReadOptions
from finetune_trainer.data.splits import Split
from testkit.rows import pairs


class FakeGpu(TorchFunctionMode):
    """Stands in for CUDA: an asynchronous copy reads its source only at `synchronize`.

    Memory that isn't pinned can't be copied, a copy that would make the host wait is an error, and
    so is any other operation that needs CUDA.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pinned: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if not any(_is_cuda(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        assert func is Tensor.to, f"{func} copies from pageable memory"
        source = args[0]
        if source.numel() == 0:  # there is nothing to copy
            return source.clone()
        assert kwargs == {"non_blocking": True}, "the host waits for this copy"
        assert any(source is pinned for pinned in self._pinned), "this memory isn't pinned"
        on_device = torch.full_like(source, -1)
        self._copies.append((source, source.clone(), on_device))
        return on_device

    def synchronize(self) -> int:
        """Carries out the copies, and returns how many there were.

        Asserts that no source has changed.
        """
        for source, before, on_device in self._copies:
            assert torch.equal(source, before), "the memory was used again before it was copied"
            on_device.copy_(source)
        return len(self._copies)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


def _split(model: Path, folder: Path) -> Split:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs(6)))
    options = ReadOptions("dataset", Renderer.load(model, 96), "fail")
    return Split(token_cache.build(folder, "rows", rows, options), np.arange(6))


@pytest.mark.parametrize("layout", ["packed", "padded", "sequence to sequence", "idle"])
def test_every_tensor_of_a_batch_is_copied_from_pinned_memory(
    layout: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_layout, "grain", lambda _: 32)  # rows of GPUs are filled up further
    split = _split(models["t5" if layout == "sequence to sequence" else "llama"], tmp_path)
    collate = Collator(layout == "packed", False, layout == "sequence to sequence", 0, 0, torch.device("cpu"))
    examples = () if layout == "idle" else (0, 2, 4)
    expected = _tensors(collate(split, examples))
    gpu = FakeGpu()
    with gpu:
        first = _on_gpu(collate, split, examples)
        _on_gpu(collate, split, examples[:2])  # the next batch is made before the copies are done
        filled = sum(tensor.numel() > 0 for tensor in expected.values())
        assert gpu.synchronize() >= 2 * filled - 2
    for name, tensor in _tensors(first).items():
        assert torch.equal(tensor, expected[name]), name


def _on_gpu(collate: Collator, split: Split, examples: tuple[int, ...]) -> Any:
    return replace(collate, device=torch.device("cuda", 0))(split, examples)


def _tensors(batch: Any) -> dict[str, Tensor]:
    tensors = {f"inputs.{name}": tensor for name, tensor in batch.inputs.items()}
    for name in ("targets", "chosen", "keep", "positions"):
        if getattr(batch, name) is not None:
            tensors[name] = getattr(batch, name)
    return tensors


def test_the_cpu_gets_its_tensors_without_a_copy() -> None:
    tensor = torch.as_tensor(np.arange(4))
    assert to_device(tensor, torch.device("cpu")) is tensor
