"""What memory decides (strategy, offload, recomputing, micro-batch), settled for all ranks alike before the model is
loaded. Called by `assembly` once; `scale` decides, here is read and told.
"""

from __future__ import annotations

from dataclasses import replace

from finetune_api.run import RunConfig
from finetune_trainer import free_memory, model, model_size, scale, zero_config
from finetune_trainer.checkpoint import State
from finetune_trainer.failure import Failed
from finetune_trainer.footprint import gib
from finetune_trainer.paths import Paths
from finetune_trainer.reporter import Reporter
from finetune_trainer.world import World


def settle(
    run: RunConfig, paths: Paths, world: World, reporter: Reporter, *, longest: int, half: bool, saved: State | None
) -> tuple[RunConfig, scale.Choice]:
    """The run with a strategy that isn't auto, and all that goes with it. `half`: products are in bfloat16.

    A resumed run keeps the strategy that its checkpoint was computed with. Raises Failed where nothing fits.
    """
    asked = scale.asked(run, longest)
    if asked.strategy == "auto" and saved is not None and saved.strategy:
        asked = replace(asked, strategy=saved.strategy, offload=saved.offload, before=True)
    model.check(paths.model)
    size = model_size.read(paths.model, run.lora if run.method == "lora" else None, run.full)
    room = free_memory.room(world)
    try:
        found = scale.choose(asked, size, scale.setting(run, half=half), room)
    except scale.TooLittleMemory as error:
        raise Failed("InvalidConfig", f"distribution.strategy {run.world.strategy}: {error}") from None
    _tell(found, run, reporter)
    if found.way.strategy.startswith("zero"):
        zero_config.prepare_environment(run.world.device)
    way = {"strategy": found.way.strategy, "offload": found.way.offload}
    return run.model_copy(update={"world": run.world.model_copy(update=way)}), found


def micro_tokens(run: RunConfig, found: scale.Choice, saved: State | None) -> tuple[int, str]:
    """(tokens that a rank computes at once, reason). A resumed run keeps them, so that sums are rounded alike."""
    if run.training.micro_batch_size == "auto" and saved is not None and saved.micro_tokens:
        return saved.micro_tokens, "the checkpoint was computed with it"
    return found.tokens, found.tokens_reason


def _tell(found: scale.Choice, run: RunConfig, reporter: Reporter) -> None:
    reporter.decision("strategy", found.way.kind, found.reason)
    reporter.decision("memory", gib(found.footprint.total(found.tokens)), found.table)
    asked = run.training.activation_checkpointing
    why = "training.activationCheckpointing says so" if asked != "auto" else "activations fit"
    if asked == "auto" and found.way.recompute:
        why = "else the activations wouldn't fit"
    reporter.decision("activationCheckpointing", "on" if found.way.recompute else "off", why)
