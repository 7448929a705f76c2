"""Decides what cpu, memory and scratch of auto mean for a pod. It does no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.resource import Spec

_GIB = 2**30
_CORES_WITHOUT_GPU = 4
_CORES_PER_GPU = 8
_MEMORY_WITHOUT_GPU = 16
_MEMORY_PER_GPU = 24  # GiB; a base of 8 B weights takes 15 GiB of each process while it is loaded
_PROCESS_MEMORY = 8  # GiB next to the model's files
_SCRATCH_WITHOUT_GPU = 20
_SCRATCH_WITH_GPU = 40
_SCRATCH_PER_GPU = 20
_SCRATCH_BESIDE_MODEL = 20
# Full training keeps four checkpoints for a moment (docs/sizing.md), with 12 bytes per weight. The
# model's files have 2 bytes per weight.
_CHECKPOINTS_OF_MODEL = 4 * 12 // 2

FEW_CORES = 4
"""Cores for each GPU below which the GPUs wait for the CPU: a process has a thread that starts
kernels, one for the backward pass, and those of NCCL."""


@dataclass(frozen=True)
class PodAmounts:
    """Holds the resources of a training pod, as Kubernetes quantities."""

    cpu: str
    memory: str
    scratch: str


def gpus_of_pod(spec: Spec) -> int:
    """Returns the number of GPUs of each pod."""
    return spec.distribution.processes_per_node if spec.resources.gpu else 0


def amounts(spec: Spec, model_bytes: int | None = None) -> PodAmounts:
    """Returns the resources of a training pod; what the job sets is never changed.

    `model_bytes` is the size of the base model's files, None if it isn't known yet.
    """
    requested, gpus = spec.resources, gpus_of_pod(spec)
    return PodAmounts(
        cpu=str(_cores(gpus)) if requested.cpu == "auto" else requested.cpu,
        memory=_gib(_memory(gpus, model_bytes or 0)) if requested.memory == "auto" else requested.memory,
        scratch=_gib(_scratch(spec, gpus, model_bytes or 0)) if requested.scratch == "auto" else requested.scratch,
    )


def _cores(gpus: int) -> int:
    return max(_CORES_WITHOUT_GPU, _CORES_PER_GPU * gpus)


def _memory(gpus: int, model_bytes: int) -> int:
    known = model_bytes + max(1, gpus) * _PROCESS_MEMORY * _GIB if model_bytes else 0
    return max(_MEMORY_WITHOUT_GPU * _GIB, _MEMORY_PER_GPU * gpus * _GIB, known)


def _scratch(spec: Spec, gpus: int, model_bytes: int) -> int:
    """Returns bytes. With several nodes, each has its share of the checkpoints of a model."""
    default = _SCRATCH_WITH_GPU + _SCRATCH_PER_GPU * gpus if gpus else _SCRATCH_WITHOUT_GPU
    if not model_bytes:
        return default * _GIB
    needed = model_bytes * (2 if spec.output.merge else 1)
    if spec.method.type == "full":
        needed += model_bytes * _CHECKPOINTS_OF_MODEL // spec.distribution.nodes
    return max(default * _GIB, needed + _SCRATCH_BESIDE_MODEL * _GIB)


def _gib(size: int) -> str:
    return f"{-(-size // _GIB)}Gi"
