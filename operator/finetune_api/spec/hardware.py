"""Defines spec.distribution and spec.resources: the number of processes, and what a pod gets."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import Model, Rule
from finetune_api.spec.rules import not_yet

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]
"""How training is distributed; `DistributionSpec.strategy` says what each one shards."""

StrategyOption = Literal["auto", Strategy]
"""A strategy as a user specifies it."""

Offload = Literal["none", "optimizer", "parameters"]
"""What is kept in the host's memory instead of the GPU's."""


class DistributionSpec(Model):
    """Specifies the number of processes, and what is sharded across them."""

    nodes: int = Field(default=1, ge=1, le=1024, description="Number of pods, one per node.")
    processes_per_node: int = Field(
        default=1,
        ge=1,
        le=16,
        description="Processes per pod, one per GPU. With resources.gpu, a pod requests this many GPUs.",
    )
    strategy: StrategyOption = Field(
        default="auto",
        description="ddp replicates everything on each process; zero1 shards the optimizer state, zero2 also the "
        "gradients, zero3 also the weights (DeepSpeed ZeRO); fsdp shards all three as well (PyTorch FSDP2). auto "
        "picks the fastest one that fits into memory, by an estimate that the log shows.",
    )
    offload: Offload = Field(
        default="none",
        description="What is kept in host memory instead of GPU memory: the optimizer state (zero2, zero3), or the "
        "weights too (zero3, fsdp). Slower; it never changes the result. With strategy auto this is a minimum: more "
        "is offloaded if memory requires it.",
    )
    sequence_parallel_size: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Number of processes that share each packed row, for rows that one GPU has no memory for (Ulysses "
        "sequence parallelism). Each of them holds an equal part of the row's tokens, and computes attention for an "
        "equal part of the heads. It must divide the number of all processes and the model's number of attention "
        "heads. 1 to 64; 1 means that every process computes rows of its own. It never changes the result.",
    )

    rules = (
        Rule("sequenceParallelSize", "must divide nodes * processesPerNode",
             "(self.nodes * self.processesPerNode) % self.sequenceParallelSize == 0",
             lambda m: (m.nodes * m.processes_per_node) % m.sequence_parallel_size == 0),
        Rule("offload", "optimizer needs strategy auto, zero2 or zero3",
             "self.offload != 'optimizer' || self.strategy in ['auto', 'zero2', 'zero3']",
             lambda m: m.offload != "optimizer" or m.strategy in ("auto", "zero2", "zero3")),
        Rule("offload", "parameters needs strategy auto, zero3 or fsdp",
             "self.offload != 'parameters' || self.strategy in ['auto', 'zero3', 'fsdp']",
             lambda m: m.offload != "parameters" or m.strategy in ("auto", "zero3", "fsdp")),
    )  # fmt: skip


class GpuSpec(Model):
    """Specifies the kind of GPU."""

    name: s.ResourceName = Field(
        default="nvidia.com/gpu",
        description="Extended resource that the pods request, one per process: nvidia.com/gpu, or one for MIG slices "
        "such as nvidia.com/mig-3g.40gb.",
    )

    rules = (
        not_yet(
            "name",
            "self.name.startsWith('nvidia.com/')",
            lambda m: m.name.startswith("nvidia.com/"),
            "a device of another vendor",
            "use a resource that begins with nvidia.com/, because the trainer image has CUDA only",
        ),
    )


def _cel_quantity(field: str) -> str:
    """Returns the CEL expression for the value of a quantity."""
    return f"quantity(string(self.{field}))"


def _sane(field: str) -> Rule:
    """Returns the rule that a quantity is more than 0, and no more than any machine has."""
    attribute = {"sharedMemory": "shared_memory"}.get(field, field)
    return Rule(
        field=field,
        message="must be more than 0 and at most 1Pi",
        cel=f"string(self.{field}) == 'auto' || ({_cel_quantity(field)}.isGreaterThan(quantity('0'))"
        f" && !{_cel_quantity(field)}.isGreaterThan(quantity('1Pi')))",
        holds=lambda m: (
            getattr(m, attribute) == "auto" or 0 < s.quantity_value(getattr(m, attribute)) <= s.MAX_QUANTITY
        ),
    )


_Extra = Annotated[dict[s.ResourceName, s.Quantity], Field(max_length=8)]
_HUGE_PAGES = "hugepages-"
_PAGE_SIZE = "^hugepages-[1-9][0-9]*[KMG]i$"
_PLAIN_AMOUNT = "^[0-9]+([KMGTP]i?)?$"
_GPUS = "^nvidia[.]com/(gpu|mig-)"


def _extra_rules() -> tuple[Rule, ...]:
    """Returns the rules for the names and amounts of additional resources."""
    is_native = "^([^/]*|([^/]*[.])?kubernetes[.]io/.*)$"
    return (
        Rule("extra", "must have names such as rdma/hca or hugepages-2Mi; cpu, memory and scratch are fields of their "
             "own",
             f"self.extra.all(k, k.startsWith('{_HUGE_PAGES}') || !k.matches('{is_native}'))",
             lambda m: all(k.startswith(_HUGE_PAGES) or not re.search(is_native, k) for k in m.extra)),
        Rule("extra", "must not contain GPUs; use resources.gpu and distribution.processesPerNode",
             f"self.extra.all(k, !k.matches('{_GPUS}') && (!has(self.gpu) || k != self.gpu.name))",
             lambda m: not any(re.search(_GPUS, k) or (m.gpu and k == m.gpu.name) for k in m.extra)),
        Rule("extra", "must have amounts of more than 0, which are whole numbers except for huge pages",
             "self.extra.all(k, quantity(string(self.extra[k])).isGreaterThan(quantity('0'))"
             f" && (k.startsWith('{_HUGE_PAGES}') || string(self.extra[k]).matches('^[0-9]+$')))",
             lambda m: all(s.quantity_value(amount) > 0 and (k.startswith(_HUGE_PAGES) or amount.isdigit())
                           for k, amount in m.extra.items())),
        Rule("extra", "must name huge pages with their size, such as hugepages-2Mi, and have a multiple of it as their "
             "amount, such as 5120Mi",
             f"self.extra.all(k, !k.startsWith('{_HUGE_PAGES}') || (k.matches('{_PAGE_SIZE}')"
             f" && string(self.extra[k]).matches('{_PLAIN_AMOUNT}') && quantity(string(self.extra[k])).asInteger()"
             f" % quantity(k.substring({len(_HUGE_PAGES)})).asInteger() == 0))",
             lambda m: all(not k.startswith(_HUGE_PAGES) or _is_whole_pages(k, amount)
                           for k, amount in m.extra.items())),
    )  # fmt: skip


def _is_whole_pages(name: str, amount: str) -> bool:
    """Returns whether Kubernetes accepts an amount of huge pages: a multiple of their size."""
    if not re.search(_PAGE_SIZE, name) or not re.search(_PLAIN_AMOUNT, amount):
        return False
    return s.quantity_value(amount) % s.quantity_value(name.removeprefix(_HUGE_PAGES)) == 0


class ResourcesSpec(Model):
    """Specifies the resources of one pod; requests and limits are the same."""

    gpu: GpuSpec | None = Field(
        default=None,
        description="Request one GPU of this kind per process. Empty means training on the CPU. Only its name can be "
        "changed; it can't be added or removed.",
    )
    cpu: s.AutoQuantity = Field(
        default="auto",
        description="CPU cores of a pod. auto is 8 for each of its GPUs, and 4 without GPUs. Below 4 cores for each "
        "GPU, the GPUs wait for the CPU.",
    )
    memory: s.AutoQuantity = Field(
        default="auto",
        description="Memory of a pod, in bytes with a suffix such as Gi. auto is 24Gi for each of its GPUs, and 16Gi "
        "without GPUs; if the preflight check has read the size of the model, it is at least that size and 8Gi for "
        "each GPU.",
    )
    shared_memory: s.Quantity = Field(
        default="1Gi", description="Size of /dev/shm, which counts toward memory. NCCL and data loaders use it."
    )
    scratch: s.AutoQuantity = Field(
        default="auto",
        description="Local disk of a pod, for the model, the data, checkpoints and the result. auto is 40Gi and 20Gi "
        "for each of its GPUs, and 20Gi without GPUs; if the preflight check has read the size of the model, it is at "
        "least 20Gi more than the model, its merged copy and its checkpoints need.",
    )
    scratch_storage_class: s.ObjectName = Field(
        default="",
        description="StorageClass of a volume that is created for each training pod as its scratch disk, and deleted "
        "with it. Empty means local disk of the node.",
    )
    extra: _Extra = Field(
        default_factory=dict,
        description="Additional resources of a training pod, by name: devices of a network for RDMA, such as rdma/hca "
        "or vpc.amazonaws.com/efa, and huge pages, such as hugepages-2Mi.",
    )

    rules = (
        *(_sane(field) for field in ("cpu", "memory", "sharedMemory", "scratch")),
        Rule("sharedMemory", "must be less than memory, toward which it counts",
             f"string(self.memory) == 'auto' || {_cel_quantity('sharedMemory')}.isLessThan({_cel_quantity('memory')})",
             lambda m: m.memory == "auto" or s.quantity_value(m.shared_memory) < s.quantity_value(m.memory)),
        *_extra_rules(),
    )  # fmt: skip
