"""Measures how much memory the trainer's own step needs on a GPU, without a GPU and without values.

The forward pass, the loss and the backward pass run on fake tensors, which have shapes and storages
but no contents, and on the branches that a GPU would take. Fake tensors are on the CPU, because
autograd asks the driver about those on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_api.resource import LoraSpec
from finetune_trainer.data.batching import packed_layout
from finetune_trainer.data.batching.collator import Batch
from finetune_trainer.kernels import attention_cpu, attention_cuda, fast_dropout, fused_modules, packed_attention
from finetune_trainer.kernels.sizes import CHUNK_BYTES, SOFTMAX_BYTES
from finetune_trainer.model import activation_checkpointing
from finetune_trainer.model import lora as adapters
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel import fsdp
from finetune_trainer.parallel.world import World

ROWS = 4
"""The number of examples in the packed row."""


@dataclass(frozen=True)
class Step:
    """Describes a step of training a model of this shape.

    `lora` is None for full training. With `fused`, norms and gated products are replaced, as ddp
    does. `ranks` is the number of ranks that fsdp shards the model over; None means that it isn't
    sharded.
    """

    shape: tuple[tuple[str, Any], ...]
    lora: LoraSpec | None
    recompute: bool
    tokens: int
    fused: bool = True
    ranks: int | None = None


def peak_bytes(step: Step, layers: int) -> int:
    """Returns the most bytes that are in use besides the rank's own weights in the second
    micro-batch of a step, extrapolated linearly to this number of layers.

    They include the gradients. If all weights are trained and activations recomputed, the peak is
    at the end of the forward pass only if there are some layers, so more of them are measured.
    """
    first = 5 if step.recompute and step.lora is None else 1
    few, more = (_measured(replace(step, shape=(*step.shape, ("num_hidden_layers", n)))) for n in (first, first + 1))
    return few + (layers - first) * (more - few)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations create inside, while they exist."""

    def __init__(self, known: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._sizes = WeakIdKeyDictionary()
        for tensor in known:
            self._sizes[tensor.untyped_storage()] = [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    @contextmanager
    def resizable(self) -> Iterator[None]:
        """Also counts what is resized inside: fsdp frees gathered weights that way."""
        original = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            result = original(storage, size)
            if storage in self._sizes:
                self._change(self._sizes[storage], int(size))
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize):
            yield

    def _count(self, storage: Any) -> None:
        if storage not in self._sizes:
            entry = [0]
            self._sizes[storage] = entry
            weakref.finalize(storage, self._change, entry, 0)
            self._change(entry, storage.nbytes())

    def _change(self, entry: list[int], size: int) -> None:
        self.current += size - entry[0]
        self.peak = max(self.peak, self.current)
        entry[0] = size


def _measured(step: Step) -> int:
    packed_attention.register()
    with _process_group(step.ranks), _cuda_branches(), FakeTensorMode(allow_non_fake_inputs=True):
        loaded = _model(step)
        loss_sum, batch = LossSum.of(loaded.base, torch.bfloat16, "cpu"), _batch(step.tokens)
        if step.ranks is not None:
            loss_sum = replace(loss_sum, context=lambda _: nullcontext())
        tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
        live = _LiveBytes(getattr(tensor, "_local_tensor", tensor) for tensor in tensors)
        with live, live.resizable():
            for _ in range(2):
                live.peak = live.current
                with loss_sum.packed_context(batch):
                    loss_sum(loaded.model, batch).backward()
        return live.peak


def _model(step: Step) -> LoadedModel:
    config = LlamaConfig(**dict(step.shape), attn_implementation=packed_attention.NAME)
    base = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16 if step.lora else torch.float32)
    loaded = LoadedModel(base, base, False, "")
    if step.lora is not None:
        base.requires_grad_(False)
        loaded = adapters.adapt(loaded, step.lora, 1)
    if step.recompute:
        activation_checkpointing.enable(loaded)
    if step.ranks is not None:
        fsdp._shard_model(
            loaded.model, World(0, step.ranks, 0, step.ranks, torch.device("cpu")), offload=False, half=torch.bfloat16
        )
    elif step.fused:
        with _always_equal():
            fused_modules.replace_modules(base)
    loaded.model.train()
    return loaded


def _batch(tokens: int) -> Batch:
    layout = packed_layout.pack([tokens // ROWS] * ROWS, [0] * ROWS).layout
    row = torch.zeros((1, layout.size), dtype=torch.int64)
    predicted = torch.zeros(layout.size - ROWS, dtype=torch.int64)
    inputs = {"input_ids": row, "position_ids": row.clone()}
    return Batch(inputs, targets=predicted, chosen=predicted.clone(), keep=predicted.clone(), layout=layout)


def _process_group(ranks: int | None) -> AbstractContextManager[None]:
    @contextmanager
    def group(size: int) -> Iterator[None]:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        mesh = device_mesh.init_device_mesh("cpu", (size,))  # needs tensors with values
        try:
            with mock.patch.object(device_mesh, "init_device_mesh", return_value=mesh):
                yield
        finally:
            dist.destroy_process_group()

    return nullcontext() if ranks is None else group(ranks)


@contextmanager
def _cuda_branches() -> Iterator[None]:
    """Makes the kernels behave on the CPU as on a GPU, and answers what they ask about values."""

    def dropout(module: Any, values: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(values, module.p, True)[0] if module.training and module.p else values

    def half(query: torch.Tensor, *_: torch.Tensor) -> bool:
        return query.dtype == torch.bfloat16

    def counts(tensor: torch.Tensor, minlength: int = 0) -> torch.Tensor:
        return torch.zeros(minlength, dtype=torch.int64)

    replacements: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (attention_cpu, "supports", lambda *_: False),
        (attention_cuda, "supports", half),
        (fast_dropout.Dropout, "forward", dropout),
        (torch, "bincount", counts),
        (FakeTensor, "tolist", lambda _: [0, 128]),
        (torch.nn.Module, "to", lambda module, *_, **__: module),
    )
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        for sizes in (CHUNK_BYTES, SOFTMAX_BYTES):
            stack.enter_context(mock.patch.dict(sizes, cpu=sizes["cuda"]))
        yield


@contextmanager
def _always_equal() -> Iterator[None]:
    """Tensors without values can't be compared, so a replacement counts as equal if its shape and
    format are."""

    def same(first: torch.Tensor, second: torch.Tensor, **_: float) -> bool:
        return first.shape == second.shape and first.dtype == second.dtype

    with mock.patch.object(torch, "equal", same), mock.patch.object(torch, "allclose", same):
        yield
