"""Records versions and driver, and measures the ceilings that other figures are compared with."""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import subprocess
import time
from pathlib import Path

import torch
from benchmarks.gpu import child, timing
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

PACKAGES = (
    "torch", "triton", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "liger-kernel", "safetensors",
    "tokenizers", "numpy", "pydantic",
)  # fmt: skip


def run(stage: child.Stage) -> None:
    with stage.guarded("versions"):
        _versions(stage)
    with stage.guarded("packed attention's kernel"):
        _varlen(stage)
    with stage.guarded("GPU samples"):
        _samples(stage)
    for case in (_copy, _products, _attention):
        with stage.guarded(case.__name__.strip("_")):
            case(stage)


def _versions(stage: child.Stage) -> None:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    missing = [name for name, version in versions.items() if not version]
    figures: dict[str, object] = {"versions": versions, "cuda": torch.version.cuda or ""}
    if stage.setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        figures |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "architectures": torch.cuda.get_arch_list(),
            "driver": _driver(),
        }
        (stage.setting.out / "nvidia-smi.txt").write_text(_command("nvidia-smi", "-q"))
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    stage.report("versions", "figure", installed + (f"; missing: {', '.join(missing)}" if missing else ""), **figures)


def _varlen(stage: child.Stage) -> None:
    """Tests whether this PyTorch's varlen_attn has the parameters that packed attention needs."""
    try:
        from torch.nn.attention import varlen
    except ImportError as error:
        stage.report("packed attention's kernel", "wrong", f"this PyTorch has no varlen_attn: {error}")
        return
    options = list(inspect.signature(varlen.varlen_attn).parameters)
    missing = {"window_size", "scale"} - set(options)
    text = f"varlen_attn lacks {', '.join(sorted(missing))}" if missing else "varlen_attn has all required parameters"
    if "enable_gqa" not in options:
        text += "; keys are repeated for each query, since it doesn't support groups"
    stage.report("packed attention's kernel", "wrong" if missing else "right", text, options=options)


def _samples(stage: child.Stage) -> None:
    from finetune_trainer.model import flops
    from finetune_trainer.reporting.gpus.watch import Gpus

    observation = Gpus().observe(timeout=10)
    samples = [sample.model_dump() for sample in observation.samples]
    if stage.setting.device != "cuda":
        text = f"{len(samples)} GPUs visible to NVML; there is none to compare with"
        stage.report("GPU samples", "skipped", text)
        stage.report("GPU figures", "skipped", text)
        return
    total = samples[0]["memory_total_bytes"] if samples else None
    expected = torch.cuda.get_device_properties(0).total_memory
    close = total is not None and abs(total - expected) < 0.05 * expected
    complete = bool(samples) and samples[0]["utilization_ratio"] is not None
    stage.report(
        "GPU samples", "right" if close and complete else "wrong",
        f"{len(samples)} visible to NVML; memory {total}, PyTorch reports {expected}; utilization "
        f"{samples[0]['utilization_ratio'] if samples else None}", samples=samples,
    )  # fmt: skip
    figures = {} if not observation.readings else vars(observation.readings[0]) | {"device": ""}
    figures["uuid"] = samples[0]["uuid"] if samples else None
    missing = [name for name, value in figures.items() if value is None or value == {}]
    needed = {"uuid", "power_watts", "temperature_celsius", "sm_clock_hertz", "throttled", "ecc_errors"}
    name = torch.cuda.get_device_name(0)
    stage.report(
        "GPU figures", "right" if samples and not needed & set(missing) else "wrong",
        f"not reported: {', '.join(missing) or 'nothing'}; faults: {'; '.join(observation.faults) or 'none'}; "
        f"peak of {name}: {flops.peak(name) or 'unknown'}", figures=figures,
    )  # fmt: skip


def _copy(stage: child.Stage) -> None:
    size = 2**24 if stage.setting.tiny else 2**31
    source = torch.empty(size, dtype=torch.uint8, device=stage.setting.device)
    target = torch.empty_like(source)
    rate = 2 * size / timing.seconds(lambda: target.copy_(source), stage.setting.device)
    stage.report("copy", "figure", f"{timing.rate(rate, 'B/s')}, read plus written", bytes_per_second=rate)


def _products(stage: child.Stage) -> None:
    """Measures square matrix products of random numbers.

    Zeros would be faster, since a chip that switches less runs at a higher clock.
    """
    size = 256 if stage.setting.tiny else 8192
    rates: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        n = size if dtype == torch.bfloat16 else size // 2
        left, right = (torch.randn(n, n, device=stage.setting.device).to(dtype) for _ in range(2))
        duration = timing.seconds(lambda left=left, right=right: left @ right, stage.setting.device)  # type: ignore[misc]
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / duration
    text = ", ".join(f"{timing.rate(rate, 'FLOP/s')} in {name}" for name, rate in rates.items())
    stage.report("products", "figure", text, flops_per_second=rates)


def _attention(stage: child.Stage) -> None:
    """Measures causal attention over one long row.

    Only pairs that attend to each other count, with four operations per element.
    """
    heads, length, size = (2, 256, 32) if stage.setting.tiny else (32, 16384, 128)
    shape = (1, heads, length, size)
    q, k, v = (torch.randn(shape, device=stage.setting.device, dtype=torch.bfloat16) for _ in range(3))
    flops = 4 * heads * size * length * (length + 1) / 2
    rates: dict[str, float] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                duration = timing.seconds(
                    lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True), stage.setting.device
                )
            rates[backend.name.lower()] = flops / duration
        except RuntimeError:
            continue  # this card or version lacks the kernel
    text = ", ".join(f"{name} {timing.rate(rate, 'FLOP/s')}" for name, rate in rates.items())
    stage.report("attention", "figure", f"forward, {length} tokens: {text or 'no kernel'}", flops_per_second=rates)


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    if path.is_file():
        return path.read_text().splitlines()[0]
    return _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").strip()


def _command(*command: str) -> str:
    began = time.monotonic()
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error} after {time.monotonic() - began:.0f} s"


if __name__ == "__main__":
    child.main("machine", run)
