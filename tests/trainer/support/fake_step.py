"""Runs the trainer's own step as on a GPU, without a GPU and without values, and measures memory.

The forward pass, the loss and the backward pass run on fake tensors, which have shapes and storages
but no contents, and on the branches that a GPU would take. Fake tensors are on the CPU, because
autograd asks the driver about those on a GPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed import device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from finetune_api.resource import LoraSpec
from finetune_trainer.data.batching import packed_layout, transfer
from finetune_trainer.data.batching.collator import Batch
from finetune_trainer.data.batching.sequence_part import SequencePart
from finetune_trainer.kernels import attention_cpu, attention_cuda, fast_dropout, packed_attention
from finetune_trainer.kernels.cuda import lora as kernels_of_adapters
from finetune_trainer.kernels.cuda import modules, softmax
from finetune_trainer.kernels.sizes import CHUNK_BYTES, PER_TOKEN_BYTES, SOFTMAX_BYTES
from finetune_trainer.model import activation_checkpointing
from finetune_trainer.model import lora as adapters
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.loss import LossSum
from finetune_trainer.parallel import fsdp_shards
from finetune_trainer.parallel.estimate.recomputation import Recomputation
from finetune_trainer.parallel.world import World

ROWS = 4
"""The usual number of examples in the packed row."""


@dataclass(frozen=True)
class Step:
    """Describes a step of training a model of this shape.

    `lora` is None for full training. With `fused`, the fused kernels are used, as on GPUs. `ranks`
    is the number of ranks that fsdp shards the model over; None means that it isn't sharded. `rows`
    is the number of examples in the packed row. With `quantized`, the base is in nf4. `parts` ranks
    share the row, of which this rank has `tokens` tokens.
    """

    shape: tuple[tuple[str, Any], ...]
    lora: LoraSpec | None
    recompute: Recomputation
    tokens: int
    fused: bool = True
    ranks: int | None = None
    rows: int = ROWS
    quantized: bool = False
    parts: int = 1


@dataclass(frozen=True)
class FakeTraining:
    """Holds the parts of a step on fake tensors.

    `host_waits` counts, by function, how often the host asked for values, for which it would wait
    on a GPU, or sent it values that the GPU's queue has to take first.
    """

    loaded: LoadedModel
    loss_sum: LossSum
    batch: Batch
    host_waits: Counter[str]


def peak_bytes(step: Step, layers: int) -> int:
    """Returns the most bytes that are in use besides the rank's own weights in the second
    micro-batch of a step, extrapolated linearly to this number of layers.

    They include the gradients. If all weights are trained and activations recomputed, the peak is
    at the end of the forward pass only if there are some layers, so more of them are measured. With
    trained copies of embeddings or of the output layer, or if both are the same weight, all are.
    """
    tied = ("tie_word_embeddings", True) in step.shape
    if step.lora.modules_to_save if step.lora else tied:
        return _measured(replace(step, shape=(*step.shape, ("num_hidden_layers", layers))))
    first = 5 if step.recompute and step.lora is None else 1
    if step.recompute and step.recompute.share < 1:
        first = 4  # of which a whole number is recomputed, and of twice as many
    further = first if first == 4 else 1
    few, more = (
        _measured(replace(step, shape=(*step.shape, ("num_hidden_layers", n)))) for n in (first, first + further)
    )
    return few + (layers - first) * (more - few) // further


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations create inside, while they exist. Those of
    tensors on the meta device have none."""

    def __init__(self, known: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._sizes = WeakIdKeyDictionary()
        for tensor in known:
            self._sizes[tensor.untyped_storage()] = [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
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


@contextmanager
def training(step: Step) -> Iterator[FakeTraining]:
    """Prepares a step. What runs inside computes shapes only."""
    packed_attention.register()
    waits: Counter[str] = Counter()
    with _process_group(step.ranks), cuda_branches(waits), FakeTensorMode(allow_non_fake_inputs=True):
        loaded = _model(step)
        loss_sum = LossSum.of(loaded.base, torch.bfloat16, "cpu")
        if step.ranks is not None:
            loss_sum = replace(loss_sum, context=lambda _: nullcontext())
        waits.clear()
        yield FakeTraining(loaded, loss_sum, batch(step.tokens, step.rows, step.parts), waits)


def _measured(step: Step) -> int:
    with training(step) as fake:
        model = fake.loaded.model
        tensors = [*model.parameters(), *model.buffers()]
        live = LiveBytes(getattr(tensor, "_local_tensor", tensor) for tensor in tensors)
        with live, live.resizable():
            for _ in range(2):
                live.peak = live.current
                with fake.loss_sum.packed_context(fake.batch):
                    fake.loss_sum(model, fake.batch).backward()
        return live.peak


def _model(step: Step) -> LoadedModel:
    config = LlamaConfig(**dict(step.shape), attn_implementation=packed_attention.NAME)
    base = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16 if step.lora else torch.float32)
    loaded = LoadedModel(base, base, False, "", quantized=step.quantized)
    if step.quantized:
        _quantize(base)
    if step.lora is not None:
        base.requires_grad_(False)
        loaded = adapters.adapt(loaded, step.lora, 1)
    if step.recompute:
        again = step.recompute
        activation_checkpointing.enable(loaded, again.share, keeps_attention=again.keeps_attention)
    if step.ranks is not None:
        mesh = fsdp_shards.Mesh.of(World(0, 0, step.ranks, step.ranks, torch.device("cpu")), 1)
        fsdp_shards.shard_model(loaded.model, mesh, offload=False, half=torch.bfloat16)
    if step.fused:
        with always_equal():
            modules.replace_modules(base, torch.device("cpu"))
        kernels_of_adapters.replace_modules(loaded.model)
    loaded.model.train()
    return loaded


def _quantize(base: torch.nn.Module) -> None:
    """Replaces the linear layers, except the output layer, with those that bitsandbytes loads in
    nf4."""
    import bitsandbytes
    from bitsandbytes import functional as formats

    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                with unset_fake_temporarily(), torch.device("meta"):  # a fake tensor can't be a Params4bit
                    replacement = bitsandbytes.nn.Linear4bit(
                        layer.in_features, layer.out_features, False, torch.bfloat16, quant_type="nf4"
                    )
                blocks = layer.weight.numel() // 64
                constants = formats.QuantState(
                    torch.zeros(blocks // 256), blocksize=256, code=torch.zeros(256), dtype=torch.float32
                )
                state = formats.QuantState(
                    torch.zeros(blocks, dtype=torch.uint8), layer.weight.shape, torch.zeros(16), 64, "nf4",
                    torch.bfloat16, torch.zeros(()), constants,
                )  # fmt: skip
                packed = torch.zeros((layer.weight.numel() // 2, 1), dtype=torch.uint8)
                weight: Any = torch.nn.Parameter(packed, requires_grad=False)
                weight.quant_state, weight.quant_type, weight.compress_statistics = state, "nf4", True
                replacement.weight = weight
                replacement.support_avx512bf16_for_cpu = False
                setattr(parent, name, replacement)


def batch(tokens: int, rows: int, parts: int = 1) -> Batch:
    """Returns one of the `parts` of a packed row of as many examples of the same length.

    Each part has `tokens` tokens. There is a target for each of them but the last of an example.
    """
    part = SequencePart(0, parts, "shared")
    length = tokens * parts // rows
    layout = packed_layout.pack([length] * rows, [0] * rows, packed_layout.grain("cuda") * parts).layout
    own = layout.size // parts
    row = torch.zeros((1, own), dtype=torch.int64)
    predicted = torch.zeros(own - (rows if parts == 1 else 0), dtype=torch.int64)
    inputs = {"input_ids": row, "position_ids": row.clone()}
    return Batch(
        inputs,
        targets=predicted,
        chosen=predicted.clone(),
        keep=predicted.clone(),
        layout=layout,
        sorted_chosen=np.arange(len(predicted)),
        sequence=part,
    )


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
def cuda_branches(waits: Counter[str] | None = None) -> Iterator[None]:
    """Makes the kernels behave on the CPU as on a GPU.

    Fake tensors have no values, so whatever waits for one on a GPU is an error here.
    """
    as_tensor, new_tensor = torch.as_tensor, torch.tensor
    counts: Counter[str] = Counter() if waits is None else waits

    def dropout(module: Any, values: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(values, module.p, True)[0] if module.training and module.p else values

    def half(query: torch.Tensor, *_: torch.Tensor) -> bool:
        return query.dtype == torch.bfloat16

    def sent(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def send(data: Any, **options: Any) -> torch.Tensor:
            counts[make.__name__] += "device" in options and not isinstance(data, torch.Tensor)
            return make(data, **options)

        return send

    def queued(data: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        return as_tensor(data, dtype=dtype)

    def in_16_bits(device: Any, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16

    grain = packed_layout.grain("cuda")

    replacements: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (attention_cpu, "supports", lambda *_: False),
        (attention_cuda, "supports", half),
        (fast_dropout.Dropout, "forward", dropout),
        (softmax, "supports", in_16_bits),
        (softmax, "accumulates_products", in_16_bits),
        (transfer, "to_device", queued),
        (packed_layout, "grain", lambda _: grain),
        (torch, "as_tensor", sent(as_tensor)),
        (torch, "tensor", sent(new_tensor)),
        (torch.nn.Module, "to", lambda module, *_, **__: module),
        (FakeTensor, "__deepcopy__", _copied),  # PyTorch's own reads the contents
        (modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb),  # replaced inside
    )
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        for sizes in (CHUNK_BYTES, PER_TOKEN_BYTES, SOFTMAX_BYTES):
            stack.enter_context(mock.patch.dict(sizes, cpu=sizes["cuda"]))
        yield


def _copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    copy = tensor.detach().clone()
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    memo[id(tensor)] = torch.nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
    return memo[id(tensor)]


@contextmanager
def always_equal() -> Iterator[None]:
    """Tensors without values can't be compared, so a replacement counts as equal if its shape and
    format are."""

    def same(first: torch.Tensor, second: torch.Tensor, **_: float) -> bool:
        return first.shape == second.shape and first.dtype == second.dtype

    with mock.patch.object(torch, "equal", same), mock.patch.object(torch, "allclose", same):
        yield
