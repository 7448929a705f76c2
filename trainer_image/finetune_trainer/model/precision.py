"""Chooses the number format of the base model: the one that the user sets, or one that is fast on
this hardware. Also checks that the loaded model computes in it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from finetune_trainer.errors import RunError
from finetune_trainer.kernels import chunked_cross_entropy
from finetune_trainer.model.partitioned import shape_of

# bfloat16 must be faster by this factor to make up for its lower precision.
_MIN_SPEEDUP = 1.3
_SHAPE = (256, 1024, 1024)
_AMPERE = (8, 0)


@dataclass
class LayerDtypes:
    """Counts the weights of the base's linear layers by the dtype in which they are stored, and by
    the dtype of the products that they were called for.

    Weights that bitsandbytes quantized are stored in no dtype of `stored`. `called` means that a
    layer was called at all: products of integers have no dtype in `computed`.
    """

    stored: Counter[torch.dtype] = field(default_factory=Counter)
    computed: Counter[torch.dtype] = field(default_factory=Counter)
    called: bool = False


def choose(option: str, device: torch.device) -> tuple[str, str]:
    """Returns (the number format, the reason).

    The format is float32 or bfloat16. On a CPU, small matrix products are timed, which takes about
    0.1 s. Raises RunError(InvalidConfig) if the GPU can't compute in the format that is set.
    """
    if device.type == "cuda":
        return choose_for_gpu(option, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if option != "auto":
        return option, "set by model.dtype"
    full, half = gflops(torch.float32), gflops(torch.bfloat16)
    figures = f"this CPU reaches {full:.0f} GFLOP/s in float32 and {half:.0f} in bfloat16"
    return ("bfloat16" if half > _MIN_SPEEDUP * full else "float32"), figures


def choose_for_gpu(option: str, name: str, capability: tuple[int, int]) -> tuple[str, str]:
    """Returns (the number format, the reason) for a GPU of this name and compute capability. It is
    pure.

    Tensor cores compute in bfloat16 as of Ampere, compute capability 8.0 (CUDA C++ Programming
    Guide, table of arithmetic throughput). PyTorch emulates it on older GPUs, more slowly than
    float32. float16 isn't offered: its gradients would need loss scaling. Raises
    RunError(InvalidConfig) if `option` is bfloat16 and the GPU is older.
    """
    gpu = f"{name} (compute capability {capability[0]}.{capability[1]})"
    if capability >= _AMPERE:
        return ("bfloat16", f"{gpu} supports bfloat16") if option == "auto" else (option, "set by model.dtype")
    if option == "bfloat16":
        raise RunError(
            "InvalidConfig",
            f"model.dtype bfloat16: {gpu} can't compute in it; use auto or float32, or a GPU of Ampere or newer "
            "(compute capability 8.0), selected with pod.nodeSelector",
        )
    reason = (
        f"{gpu} is older than Ampere, the first generation with bfloat16: weights take twice the memory, and tensor "
        "cores aren't used; use a GPU of Ampere or newer for bfloat16"
    )
    return "float32", reason if option == "auto" else f"set by model.dtype; {reason}"


def gflops(dtype: torch.dtype, seconds: float = 0.04) -> float:
    """Returns the speed of matrix products on this CPU in GFLOP/s, measured for about `seconds`."""
    rows, inner, columns = _SHAPE
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    torch.mm(left, right)
    start, runs = time.perf_counter(), 0
    while runs == 0 or time.perf_counter() - start < seconds:
        torch.mm(left, right)
        runs += 1
    return 2 * rows * inner * columns * runs / (time.perf_counter() - start) / 1e9


def keep_activations(model: Any) -> None:
    """Makes trained copies of a half-precision base's modules return what the base's would.

    The copies are float32. Those of linear layers compute in the run's format anyway, but without
    this, a copy of the embeddings would make all activations between matrix products float32.
    """
    from peft.utils import ModulesToSaveWrapper

    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or isinstance(wrapper.original_module, torch.nn.Linear):
            continue
        dtype = next((parameter.dtype for parameter in wrapper.original_module.parameters()), torch.float32)
        if dtype in (torch.bfloat16, torch.float16):
            for trained in wrapper.modules_to_save.values():
                trained.register_forward_hook(partial(_converted, dtype))


def _converted(dtype: torch.dtype, module: Any, inputs: Any, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, torch.Tensor) else None


@contextmanager
def observing(base: Any) -> Iterator[LayerDtypes]:
    """Observes the forward passes of a base model inside.

    Adapters and the output layer aren't counted: the former follow the base, and the loss of the
    latter is computed in its own way.
    """
    layers = LayerDtypes()
    linear = list(_linear_layers(base))
    frozen = [module for module in linear if not module.weight.requires_grad]
    for module in frozen or linear:  # trained copies of a frozen base's modules are float32
        if module.weight.is_floating_point():
            layers.stored[getattr(module.weight, "ds_tensor", module.weight).dtype] += _size(module)

    def count(module: Any, inputs: Any, output: Any) -> None:
        layers.called = True
        dtype = _product_dtype(module, output)
        if dtype is not None:
            layers.computed[dtype] += _size(module)

    hooks = [module.register_forward_hook(count) for module in linear]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def check(decided: torch.dtype, expected: torch.dtype, layers: LayerDtypes, strategy: str) -> None:
    """Checks that most linear layers compute in the decided dtype, and are stored in the expected
    one. Some model families compute a few layers in float32 by design.

    Raises RunError(TrainingError) otherwise.
    """
    stored, computed = _most_frequent(layers.stored), _most_frequent(layers.computed)
    if stored in (expected, None) and computed in (decided, None):
        return
    loaded = "quantized" if stored is None else f"loaded in {_name(stored)}"
    raise RunError(
        "TrainingError",
        f"the run was to load its linear layers in {_name(expected)} and to compute them in {_name(decided)}, but with "
        f"strategy {strategy} they are {loaded} and computed in {_name(computed or decided)}; this is a bug: report it "
        "with the model's name, and choose another distribution.strategy until it is fixed",
    )


def _linear_layers(base: Any) -> Iterator[Any]:
    """Returns the base's linear layers without adapters and output layer."""
    head = chunked_cross_entropy.output_layer(base)
    for name, module in base.named_modules():
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and module is not head and ".lora_" not in name:
            yield module


def _size(module: Any) -> int:
    return math.prod(shape_of(module.weight))


def _product_dtype(module: Any, output: Any) -> torch.dtype | None:
    """Returns the dtype in which a layer computed, or None for integers.

    bitsandbytes converts the result to the dtype of the layer's input, so it says nothing.
    """
    if module.weight.is_floating_point():
        return output.dtype  # type: ignore[no-any-return]
    return getattr(module, "compute_dtype", None)


def _most_frequent(weights: Mapping[torch.dtype, int]) -> torch.dtype | None:
    return max(weights, key=lambda dtype: weights[dtype], default=None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
