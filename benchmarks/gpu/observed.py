"""Runs a rank as `python -m finetune_trainer.rank` does, and observes it from outside.

Global hooks of PyTorch are called for every module. They count the matrix products by the dtype in
which they were computed, the points at which the host waited for the GPU, and the kernels of two
micro-batches. Nothing in the trainer is replaced. All figures are written to REPORT as JSON
whenever they change, since a rank that fails ends without cleaning up.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import runpy
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_KERNELS = 25
_SYNC = "called a synchronizing CUDA operation"


class Observer:
    """Observes the first micro-batches of training, which are forward passes with gradients.

    It counts products in the first, host syncs in the second, and kernels in the third and fourth.
    Then it removes its hooks, so that later steps run as they do without it.
    """

    def __init__(self, report: Path, *, rank: int, kernels: bool, memory: int | None, most_tokens: int | None) -> None:
        self._report = report
        self._rank = rank
        self._kernels = kernels
        self._most_tokens = most_tokens
        self._cuda = torch.cuda.is_available()
        self._top: torch.nn.Module | None = None
        self._micro_batches = 0
        self._products: Counter[tuple[str, str]] = Counter()
        self._syncs: Counter[str] = Counter()
        self._profiler: Any = None
        self.figures: dict[str, Any] = {}
        if memory is not None and self._cuda:
            torch.cuda.set_per_process_memory_fraction(memory / torch.cuda.get_device_properties(0).total_memory)
        self._hooks = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, always_call=True),
        ]
        atexit.register(self.write)

    def _before(self, module: torch.nn.Module, inputs: Any) -> None:
        if self._most_tokens and isinstance(module, torch.nn.Embedding) and inputs[0].numel() > self._most_tokens:
            raise torch.OutOfMemoryError(f"CUDA out of memory (simulated): {inputs[0].numel()} tokens at a time")
        if self._top is None and torch.is_grad_enabled() and _is_full_model(module):
            self._top = module
            self._micro_batches += 1
            self._next()

    def _after(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self._micro_batches == 1 and self._top is not None:
            self._count(module, inputs, output)
        if module is self._top:
            self._top = None

    def _next(self) -> None:
        """Starts and stops the counters at the beginning of a micro-batch."""
        if self._micro_batches == 2:
            self._watch_syncs(True)
        if self._micro_batches == 3:
            self._watch_syncs(False)
            self._begin_profile()
        if self._micro_batches == 5 or (self._micro_batches == 3 and not self._kernels):
            self._end_profile()
            if not self._most_tokens:
                for hook in self._hooks:
                    hook.remove()
        self.write()

    def _count(self, module: Any, inputs: Any, output: Any) -> None:
        """Adds the FLOPs of a linear layer's forward product, by the dtype of its output."""
        out_features = getattr(module, "out_features", None)
        if out_features is None or not isinstance(output, torch.Tensor) or output.shape[-1] != out_features:
            return  # not a linear layer, or the output layer, which returns a loss
        role = "adapter" if self._rank in (module.in_features, out_features) else "base"
        kind = str(output.dtype).removeprefix("torch.")
        self._products[role, kind] += 2 * module.in_features * output.numel()

    def _watch_syncs(self, on: bool) -> None:
        if not self._cuda:
            return
        torch.cuda.set_sync_debug_mode("warn" if on else "default")
        if not on:
            return
        before = warnings.showwarning

        def count_sync(message: Any, category: Any, filename: str, line: int, *rest: Any) -> None:
            if _SYNC in str(message):
                self._syncs[f"{Path(filename).name}:{line}"] += 1
            else:
                before(message, category, filename, line, *rest)

        warnings.simplefilter("always")
        warnings.showwarning = count_sync  # type: ignore[assignment]

    def _begin_profile(self) -> None:
        if not self._kernels:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.__enter__()

    def _end_profile(self) -> None:
        if self._profiler is None:
            return
        if self._cuda:
            torch.cuda.synchronize()
        self._profiler.__exit__(None, None, None)
        name = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        events = sorted(self._profiler.key_averages(), key=lambda event: -getattr(event, name))
        total = sum(getattr(event, name) for event in events) or 1.0
        self.figures["kernels"] = [
            {
                "name": event.key[:120],
                "calls": event.count,
                "seconds": getattr(event, name) / 1e6,
                "share": getattr(event, name) / total,
            }
            for event in events[:_KERNELS]
        ]
        self._profiler = None

    def write(self) -> None:
        """Writes the figures; the file is replaced atomically."""
        totals = Counter[str]()
        for (role, _), flops in self._products.items():
            totals[role] += flops
        self.figures["products"] = {
            f"{role} {kind}": flops / totals[role] for (role, kind), flops in sorted(self._products.items())
        }
        self.figures["host_syncs"] = dict(self._syncs.most_common()) if self._cuda else None
        if self._cuda and torch.cuda.is_initialized():
            self.figures["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            self.figures["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        partial = self._report.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(self.figures))
        os.replace(partial, self._report)


def _report_autocast_as_on_cuda() -> None:
    """Makes torch.is_autocast_enabled() without a device report the CPU's autocast.

    Without a device it means CUDA, and DeepSpeed and PEFT call it so. On a CPU it would always be
    False, and their behavior under autocast would stay untested.
    """
    original = torch.is_autocast_enabled

    def enabled(*device: str) -> bool:
        return bool(original(*device) if device else original("cpu"))

    torch.is_autocast_enabled = enabled


def _is_full_model(module: torch.nn.Module) -> bool:
    """Whether the module is a full language model, not a part that is tested before training."""
    return any(isinstance(part, torch.nn.Embedding) for part in module.modules())


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.observed", description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument(
        "--rank", type=int, default=0, help="rank of the adapters; distinguishes their products from the base model's"
    )
    parser.add_argument("--kernels", action="store_true", help="profile two micro-batches")
    parser.add_argument("--memory", type=int, help="bytes of GPU memory that this process may allocate")
    parser.add_argument(
        "--most-tokens", type=int, help="without a GPU: raise an out-of-memory error above this many tokens at a time"
    )
    parser.add_argument("--cuda-autocast", action="store_true", help="without a GPU: report autocast as on CUDA")
    options = parser.parse_args(arguments)
    Observer(
        options.report, rank=options.rank, kernels=options.kernels, memory=options.memory,
        most_tokens=options.most_tokens,
    )  # fmt: skip
    if options.cuda_autocast:
        _report_autocast_as_on_cuda()
    sys.argv = ["finetune_trainer.rank"]
    runpy.run_module("finetune_trainer.rank", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
