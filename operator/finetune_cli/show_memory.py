"""What a model needs of each process, by way of splitting it, for `finetune plan --model DIR`. Reads headers only."""

from __future__ import annotations

from pathlib import Path

from finetune_api.resource import ResourcesSpec
from finetune_api.run import RunConfig
from finetune_api.scalars import quantity_value
from finetune_trainer import model_size, scale
from finetune_trainer.footprint import Footprint, Way, footprint, gib

_WAYS = (
    Way("ddp"),
    Way("zero2"),
    Way("fsdp"),
    Way("fsdp", recompute=True),
    Way("zero3", "parameters", recompute=True),
)


def room(config: RunConfig, resources: ResourcesSpec, gpu_memory: int | None) -> scale.Room | None:
    """Of one process; None where nobody said how large the GPUs are."""
    host = int(quantity_value(resources.memory)) // config.world.processes_per_node
    if config.world.device == "cpu":
        return scale.Room("cpu", host, host)
    return None if gpu_memory is None else scale.Room("cuda", gpu_memory, host)


def lines(config: RunConfig, folder: Path, there: scale.Room | None) -> list[str]:
    """For people. Raises the trainer's Failed where the folder can't be read as a model."""
    size = model_size.read(folder, config.lora if config.method == "lora" else None, config.full)
    half = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and config.world.device == "cuda")
    asked = scale.asked(config, config.data.max_sequence_length)
    setting = scale.setting(config, half=half)
    shown = [
        f"memory of a process, {asked.least} tokens at once, products in {'bfloat16' if half else 'float32'}: "
        f"{size.parameters:,} parameters, {size.trained:,} trained"
    ]
    shown += [_line(way, footprint(size, setting, way), asked.least) for way in _WAYS]
    if there is None:
        return [*shown, "  strategy auto takes the first that fits; say how large a GPU is with --gpu-memory"]
    try:
        found = scale.choose(asked, size, setting, there)
    except scale.TooLittleMemory as error:
        return [*shown, f"  {error}"]
    return [*shown, f"  chosen: {found.way} ({found.reason}); {found.tokens} tokens at once"]


def _line(way: Way, needs: Footprint, tokens: int) -> str:
    host = f"; {gib(needs.host)} of the host" if way.offload != "none" else ""
    return f"  {way!s:<52} {gib(needs.total(tokens)):>11} ({needs.table(tokens)}{host})"
