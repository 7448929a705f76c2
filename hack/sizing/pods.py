"""What a training pod needs of its node besides GPUs: memory and scratch disk. Pure.

The memory estimate has the memory that the run itself needs. The rest follows from what the
trainer's code writes.
"""

from __future__ import annotations

from finetune_api.resource import ResourcesSpec
from finetune_api.scalars import quantity_value
from finetune_trainer.checkpoint.local_folder import KEPT_LOCALLY
from finetune_trainer.parallel.memory_estimate import MemoryEstimate, TrainingSetup
from finetune_trainer.parallel.model_size import ModelSize

CHECKPOINT_BYTES = 12
"""Bytes per trained weight in a checkpoint of AdamW: the weight and two moments, in float32."""

FILE_BYTES = 2
"""Bytes per weight in the published files of all models, which are in bfloat16."""

ADAPTER_BYTES = 4
"""Bytes per trained weight in the files of an adapter, which are in float32."""

PROCESS_BYTES = 2**29
"""What Python and its libraries take in each process: measured on the CPU (docs/decisions/0019)."""


def memory_bytes(setup: TrainingSetup, estimate: MemoryEstimate) -> int:
    """Returns the bytes of memory that a pod with all processes of a run needs at least: what the
    estimate counts, the processes themselves, and /dev/shm."""
    shared_memory = int(quantity_value(ResourcesSpec().shared_memory))
    return estimate.host.peak + setup.ranks * PROCESS_BYTES + shared_memory


def scratch_bytes(size: ModelSize, setup: TrainingSetup) -> int:
    """Returns the bytes of scratch disk that a pod with all processes of a run needs at least, for
    everything but rows and tokens.

    It is the model, the checkpoint that the run resumes from, its own complete checkpoints, and
    the larger of one that is being written and of the result.
    """
    base = size.parameters if setup.full else size.parameters - size.trained
    result = size.parameters * FILE_BYTES if setup.full else size.trained * ADAPTER_BYTES
    checkpoint = size.trained * CHECKPOINT_BYTES
    return base * FILE_BYTES + (1 + KEPT_LOCALLY) * checkpoint + max(checkpoint, result)
