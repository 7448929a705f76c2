"""Records in which dtypes the linear layers of a rank compute, and how many copies of weights live.

A rank's process is prepared before its run starts (see `rank_runs.RunningRanks`). What it records
is in the run's scratch folder, one JSON object a line, each distinct record once.
"""

from __future__ import annotations

import gc
import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_trainer.paths import Paths


@dataclass(frozen=True)
class ProductRecords:
    """What a process records.

    With `cuda_autocast`, torch.is_autocast_enabled() without a device reports the CPU's autocast.
    Without a device it means CUDA's, and DeepSpeed and PEFT call it so: on a CPU it would always be
    False. With `casts`, the bfloat16 copies of float32 weights that live at the same time are
    counted. With `widened`, linear layers return float32 whatever they compute in.
    """

    cuda_autocast: bool = False
    casts: bool = False
    widened: bool = False

    def install(self) -> None:
        if self.cuda_autocast:
            _report_autocast_as_on_cuda()
        if self.widened:
            register_module_forward_pre_hook(_narrow)
            register_module_forward_hook(_widen)
        recorder = _Recorder(_LiveCasts() if self.casts else None)
        register_module_forward_hook(recorder.record)


@dataclass(frozen=True)
class Product:
    """A linear layer's product in training: the dtypes of its result and of its weight, which is
    trained or not, and the number of copies of weights that lived when it was computed."""

    computed: str
    stored: str
    trained: bool
    casts: int


def read(paths: Paths, rank: int = 0) -> list[Product]:
    """Returns what a rank recorded."""
    path = _file(paths.scratch, rank)
    return [Product(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def _file(scratch: Path, rank: int) -> Path:
    return scratch / f"products-{rank}.jsonl"


def _report_autocast_as_on_cuda() -> None:
    original = torch.is_autocast_enabled

    def enabled(*device: str) -> bool:
        return bool(original(*device) if device else original("cpu"))

    torch.is_autocast_enabled = enabled


def _narrow(module: torch.nn.Module, inputs: Any) -> Any:
    return None if _output_width(module) is None else (inputs[0].bfloat16(), *inputs[1:])


def _widen(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    return None if _output_width(module) is None else output.float()


class _LiveCasts(TorchDispatchMode):
    """Counts bfloat16 copies of matrices, from the moment of its creation on."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: list[Any] = []
        self.shapes: set[tuple[int, ...]] = set()
        self.__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if "_to_copy" in str(function) and output.dtype == torch.bfloat16 and tuple(output.shape) in self.shapes:
            self._copies.append(weakref.ref(output.untyped_storage()))
        return output

    def count(self) -> int:
        gc.collect()
        self._copies = [copy for copy in self._copies if copy() is not None and copy().nbytes()]
        return len(self._copies)


class _Recorder:
    def __init__(self, casts: _LiveCasts | None) -> None:
        self._casts = casts
        self._written: set[tuple[str, str]] = set()

    def record(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        width = _output_width(module)
        if width is None:
            return
        weight: Any = module.weight
        if not torch.is_grad_enabled() or output.shape[-1] != width:
            return  # an evaluation, or the output layer, which returns a loss
        if self._casts is not None:
            self._casts.shapes.add(tuple(weight.shape))
        values = {
            "computed": _name(output.dtype),
            "stored": _name(weight.ds_tensor.dtype if hasattr(weight, "ds_tensor") else weight.dtype),
            "trained": bool(weight.requires_grad),
            "casts": self._casts.count() if self._casts is not None else 0,
        }
        scratch, line = os.environ["FINETUNE_SCRATCH"], json.dumps(values)
        if (scratch, line) not in self._written:
            self._written.add((scratch, line))
            with _file(Path(scratch), int(os.environ["RANK"])).open("a") as file:
                file.write(line + "\n")


def _output_width(module: torch.nn.Module) -> int | None:
    """Returns the number of a linear layer's outputs, or None for another module."""
    if isinstance(module, torch.nn.Linear):
        return module.out_features
    return int(module.nf) if type(module).__name__ == "Conv1D" else None  # type: ignore[arg-type]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
