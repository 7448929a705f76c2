"""Claims about GPUs that were made without one, and whether a check on a GPU confirmed them. Pure.

The numbers are those of the review of commit 96d635c. A claim is judged by the latest result that
tests it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Findings = Mapping[str, Mapping[str, Any]]
"""The findings of one result, by `stage/name`."""

BY_SEMANTICS = "run on a CPU that emulates CUDA's behavior"
BY_FAKES = "computed with fake tensors"
BY_RUN = "run on a CPU"
BY_READING = "read from the source"
BY_ARITHMETIC = "calculated"
BY_INTERPRETER = "run by Triton's interpreter"


@dataclass(frozen=True)
class Claim:
    """A claim, how it is known without a GPU, and how findings confirm it.

    `judge` returns whether the findings on a GPU confirm the claim, None if they don't decide it.
    `fixed_in` is the file name of the decision page of the change that removed the fault, if any:
    from then on, a GPU is expected to refute the claim.
    """

    number: str
    text: str
    known_by: str
    judge: Callable[[Findings], bool | None] | None = None
    fixed_in: str = ""


def _verdict(name: str, verdict: str) -> Callable[[Findings], bool | None]:
    return lambda findings: findings[name]["verdict"] == verdict if name in findings else None


def _float32(name: str) -> Callable[[Findings], bool | None]:
    def judge(findings: Findings) -> bool | None:
        products = findings.get(name, {}).get("figures", {}).get("products")
        return None if not products else float(products.get("base float32", 0.0)) > 0.5

    return judge


def _figures(name: str, condition: Callable[[Mapping[str, Any]], bool]) -> Callable[[Findings], bool | None]:
    def judge(findings: Findings) -> bool | None:
        try:
            return condition(findings[name]["figures"])
        except (KeyError, TypeError, ZeroDivisionError):
            return None

    return judge


def _copies(findings: Findings) -> bool | None:
    """Whether the trainer's FSDP needs much more memory than with a mixed-precision policy."""
    try:
        ours, with_policy = (
            findings[f"fsdp/{name}"]["figures"]["peak_bytes"] for name in ("as the product", "mixed precision")
        )
        return bool(ours > 1.2 * with_policy) if with_policy else None
    except KeyError:
        return None


def _fragments(findings: Findings) -> bool | None:
    try:
        usual, expandable = (
            1 - figures["peak_allocated_bytes"] / figures["peak_reserved_bytes"]
            for figures in (findings[f"memory/{name}"]["figures"] for name in ("fragments", "fragments, expandable"))
        )
        return bool(usual > expandable + 0.05)
    except KeyError:
        return None


_KERNELS = [f"fused/{name}, bfloat16" for name in ("norm", "norm of a sum", "norm, backward", "swiglu", "rotary")]


def _bandwidth(findings: Findings) -> bool | None:
    """Whether the kernels' bandwidth is close to that of a copy."""
    try:
        copy = findings["machine/copy"]["figures"]["bytes_per_second"] / 1e9
        return all(findings[name]["figures"]["gigabytes_per_second"] >= 0.8 * copy for name in _KERNELS)
    except (KeyError, TypeError):
        return None


def _exact(findings: Findings) -> bool | None:
    verdicts = [findings[name]["verdict"] for name in _KERNELS if name in findings]
    return all(verdict == "right" for verdict in verdicts) if len(verdicts) == len(_KERNELS) else None


def _head_chunks(findings: Findings) -> bool | None:
    try:
        times = {
            size: findings[f"head/LoRA, {size} MiB"]["figures"]["seconds_each"] for size in (32, 64, 128, 256, 512)
        }
        exact = findings["head/exact, LoRA"]["verdict"] == "right"
        fused = findings["head/LoRA, 256 MiB"]["figures"]["fused"]
        return bool(exact and fused and times[256] <= 1.05 * min(times.values()))
    except KeyError:
        return None


_PRECISION = "0033-mixed-precision.md"
_ESTIMATE = "0019-memory-estimate.md"
_HOST_MEMORY = "0039-host-memory.md"
_PODS = "0034-pods-for-gpu-clusters.md"
_OBSERVED = "0042-what-a-gpu-says.md"
_FUSED = "0036-fused-kernels.md"
_ROOFLINE = "0035-roofline.md"
_ATTENTION = "0037-attention-on-gpus.md"
_SHARDED_NF4 = "0038-quantized-bases-under-fsdp.md"
_SCHEDULING = "0040-network-profiles-and-scheduling.md"
_TOKENS = "0052-long-contexts-and-selective-recomputation.md"
_MODEL_CACHE = "0041-model-cache.md"

CLAIMS = (
    Claim("G1", "LoRA with zero2 fails in its first forward pass", BY_SEMANTICS,
          _verdict("ranks/LoRA, zero2", "wrong"), _PRECISION),
    Claim("G1", "full training with zero2 computes in float32", BY_SEMANTICS, _float32("ranks/full, zero2"),
          _PRECISION),
    Claim("G2", "zero3 stores and computes a bfloat16 base in float32", BY_RUN, _float32("ranks/LoRA, zero3"),
          _PRECISION),
    Claim("G3", "auto offloads the optimizer to save little, before it tries smaller micro-batches",
          BY_RUN, fixed_in=_ESTIMATE),
    Claim("G4", "fsdp keeps a full bfloat16 copy of the model on every GPU", BY_FAKES, _copies, _PRECISION),
    Claim("G5", "saving, and loading with fsdp, need host memory that no estimate includes",
          BY_READING, fixed_in=_HOST_MEMORY),
    Claim("G6", "an error about a lack of host memory reports GPU memory", BY_RUN, fixed_in=_ESTIMATE),
    Claim(
        "G7", "the memory estimate is off by more than 15%", BY_FAKES,
        _figures("large/LoRA q,v", lambda f: abs(f["estimate_bytes"] / f["peak_allocated_bytes"] - 1) > 0.15),
        fixed_in=_ESTIMATE,
    ),
    Claim("G8", "a slow load or save counts as a stall", BY_READING, fixed_in=_PODS),
    Claim("G9", "RDMA isn't available, and NCCL can't be configured", BY_READING, fixed_in=_PODS),
    Claim("G10", "a driver that is too old, or lost, fails a job permanently", BY_READING, fixed_in=_PODS),
    Claim("G11", "several MIG slices in a pod, and GPUs of other vendors, fail after allocation",
          BY_READING, fixed_in=_PODS),
    Claim("G12", "CUDA faults are attributed to the training program", BY_READING, fixed_in=_PODS),
    Claim("G13", "two groups that each have half of their pods wait for each other forever", BY_ARITHMETIC,
          fixed_in=_SCHEDULING),
    Claim("G14", "the defaults for CPU, memory and scratch starve GPUs", BY_READING, fixed_in=_SCHEDULING),
    Claim("G15", "fragmentation costs memory that expandable segments would save", BY_ARITHMETIC, _fragments, _PODS),
    Claim("G16", "compile: always recompiles for each layout, and then falls back to eager", BY_RUN,
          fixed_in=_FUSED),
    Claim(
        "G17", "gradients of a prefix that 300 examples share are off by 1% or more, or differ when repeated",
        BY_ARITHMETIC,
        _figures(
            "attention/300 readers of 287 tokens", lambda f: max(f["errors"].values()) > 1e-2 or not f["repeatable"]
        ),
        _ATTENTION,
    ),
    Claim("G18", "the kernel's own sliding window is exact, so families with windows can be packed", BY_SEMANTICS,
          _verdict("attention/windows", "right")),
    Claim("G18", "with attention sinks, scaling the kernel's output and denominators is exact", BY_SEMANTICS,
          _verdict("attention/sinks", "right")),
    Claim("G19", "Gemma 2 runs eager attention and keeps all scores in memory", BY_READING, fixed_in=_ATTENTION),
    Claim("G20", "a head size that isn't a multiple of 8 fails in the kernel", BY_READING,
          _verdict("attention/odd head size", "failed"), _ATTENTION),
    Claim(
        "G21", "the forward and backward seconds of a step only measure kernel launches", BY_READING,
        _figures("large/LoRA q,v", lambda f: f["step_seconds"]["forward"] < 0.1 * f["step_seconds"]["total"]),
        _ROOFLINE,
    ),
    Claim("G22", "zero3 gathers weights without overlap, and offloaded AdamW is a slow loop", BY_READING,
          fixed_in=_SHARDED_NF4),
    Claim("G23", "GPUs without bfloat16 train in float32 without saying what it costs", BY_READING,
          fixed_in=_SHARDED_NF4),
    Claim("G24", "answers are generated at 25 to 30 tokens per second and row", BY_ARITHMETIC),
    Claim("G25", "the check of a result is placed on the GPU because of its memory alone", BY_READING, fixed_in=_PODS),
    Claim("G26", "to check a result, a quantized base is quantized again on the CPU", BY_READING,
          _verdict("ranks/nf4", "wrong"), _PODS),
    Claim("G27", "power, temperature, clocks, errors and UUIDs of GPUs aren't exported", BY_READING,
          _verdict("machine/GPU figures", "wrong"), _OBSERVED),
    Claim("G28", "a slow rank isn't identified", BY_READING, fixed_in=_OBSERVED),
    Claim("G29", "NCCL's flight recorder isn't used", BY_READING,
          _verdict("operations/flight recorder", "wrong"), _OBSERVED),
    Claim("G30", "every pod of every attempt downloads the model again", BY_READING, fixed_in=_MODEL_CACHE),
    Claim("G31", "a quantized base trains with ddp only", BY_READING, fixed_in=_SHARDED_NF4),
    Claim("G32", "full training with ddp reduces its gradients after the backward pass, in float32", BY_READING,
          fixed_in=_ROOFLINE),
    Claim("G33", "ranks with GPUs wait while rank 0 tokenizes", BY_READING, fixed_in=_TOKENS),
    Claim("G34", "the grace period is the same for every job", BY_READING, fixed_in=_PODS),
    Claim(
        "§2", "the chunked head makes the host wait at least twice per chunk", BY_READING,
        _figures("head/LoRA, 32 MiB", lambda f: f["host_syncs"] >= 8), _ROOFLINE,
    ),
    Claim("§2", "norms, gated products and rotary embeddings aren't fused on a GPU", BY_FAKES,
          _verdict("fused/taken", "wrong"), _FUSED),
    Claim(
        "§3.8", "the fused kernels move at least 80% of what a copy moves per second", BY_ARITHMETIC,
        _bandwidth,
    ),
    Claim("§3.8", "the fused kernels are exact to two units in the last place on a GPU", BY_INTERPRETER, _exact),
    Claim("§3.7", "compiled layers with fused kernels save 8% of the time of long runs on a GPU", BY_ARITHMETIC),
    Claim(
        "R1", "the fused softmax of the head runs and is exact, and its chunks of 256 MiB are within 5% of the fastest",
        BY_FAKES, _head_chunks,
    ),
    Claim("M1", "a copy of the model on every node makes fsdp on several nodes faster than one copy over all of them",
          BY_ARITHMETIC),
    Claim("S1", "processes on several GPUs that share a row compute its loss and gradients as one process does",
          BY_RUN),
    Claim("S2", "exchanging heads over NVLink takes less than 10% of the time of a row of 65,536 tokens or more",
          BY_ARITHMETIC),
    Claim("R2", "an 8B model trains at 40% MFU or more with LoRA on q and v (57.6% in the model)", BY_FAKES,
          _figures("large/LoRA q,v", lambda f: f["mfu"] >= 0.40 and "8B" in f["shape"])),
    Claim(
        "§2", "an 8B model trains at 33 to 40% MFU with LoRA on q and v", BY_FAKES,
        _figures("large/LoRA q,v", lambda f: 0.33 <= f["mfu"] <= 0.40 and "8B" in f["shape"]),
    ),
)  # fmt: skip


def answer(claim: Claim, results: Sequence[Findings]) -> str:
    """Returns right, wrong or not tested: the verdict of the first result that has one."""
    if claim.judge is None:
        return "not tested"
    verdicts = (claim.judge(findings) for findings in results)
    verdict_of_gpu = next((verdict for verdict in verdicts if verdict is not None), None)
    return "not tested" if verdict_of_gpu is None else "right" if verdict_of_gpu else "wrong"
