"""What hardware, model and rows decide of a run before anything is loaded. Pure: facts in,
decisions out.

This is the first of three steps: `resolve`, then `load` the model and wrap it in a strategy, then
`packing_setup`, which needs the loaded model. `setup` composes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune_api.messages.run import RunConfig
from finetune_api.spec.hardware import Strategy
from finetune_api.spec.recipe import GradientFormat
from finetune_trainer.checkpoint.state import CheckpointState
from finetune_trainer.errors import RunError
from finetune_trainer.parallel import strategy_choice
from finetune_trainer.parallel.estimate.host_memory import gib
from finetune_trainer.parallel.estimate.recomputation import Recomputation
from finetune_trainer.parallel.free_memory import FreeMemory, TooLittleMemory
from finetune_trainer.parallel.model_size import ModelSize
from finetune_trainer.parallel.strategy_choice import Choice, UserChoice


@dataclass(frozen=True)
class Facts:
    """What is known before the model is loaded; the same on every rank.

    `dtype` is the number format that this hardware suggests, with the reason. `longest` is the
    number of tokens in the longest row. `halvings` says how often earlier attempts of this node
    halved micro-batches. `saved` is the checkpoint that the run resumes from.
    """

    dtype: tuple[str, str]
    longest: int
    size: ModelSize
    free_memory: FreeMemory
    halvings: int
    saved: CheckpointState | None


@dataclass(frozen=True)
class Decision:
    """An automatic choice, as it is logged and recorded in the manifest."""

    topic: str
    choice: str
    reason: str


@dataclass(frozen=True)
class ResolvedRun:
    """A run with everything decided that doesn't need the loaded model.

    `run` is the run's configuration with a strategy other than auto. `micro_batch_tokens` is how
    many tokens a rank computes at a time, before any of the `halvings`. `longest` is the number of
    tokens in the longest row. `ran_out_of_memory` says that the last attempt did, and that no
    checkpoint since then was computed with the smaller micro-batches. fsdp trains `replicas` copies
    of the model, each of which a number of ranks share.
    """

    run: RunConfig
    dtype: str
    recompute: Recomputation
    longest: int
    micro_batch_tokens: int
    micro_batch_reason: str
    halvings: int
    ran_out_of_memory: bool
    size: ModelSize
    replicas: int
    gradient_messages: GradientFormat
    decisions: tuple[Decision, ...]

    @property
    def half(self) -> bool:
        """Whether products are computed in bfloat16."""
        return self.dtype == "bfloat16"


def resolve(run: RunConfig, facts: Facts) -> ResolvedRun:
    """A resumed run keeps the number format, strategy and micro-batches of its checkpoint.

    Raises RunError if nothing fits into memory.
    """
    saved = facts.saved
    saved_halvings = saved.halvings if saved else 0
    dtype = (saved.dtype, "the checkpoint was computed in it") if saved and saved.dtype else facts.dtype
    half = dtype[0] == "bfloat16"
    setup = strategy_choice.training_setup(run, half=half)
    user_choice = _with_saved_strategy(strategy_choice.user_choice(run, facts.longest), saved, setup.ranks)
    try:
        choice = strategy_choice.choose(user_choice, facts.size, setup, facts.free_memory)
    except TooLittleMemory as error:
        value = f" {run.world.strategy}" if error.field == "distribution.strategy" else ""
        raise RunError("InvalidConfig", f"{error.field}{value}: {error}") from None
    tokens, tokens_reason = _micro_batch_tokens(run, choice, saved)
    messages = gradient_messages(run, choice.parallel.strategy, half=half)
    return ResolvedRun(
        run=_with_strategy(run, choice),
        dtype=dtype[0],
        recompute=choice.parallel.recompute,
        longest=facts.longest,
        micro_batch_tokens=tokens,
        micro_batch_reason=tokens_reason,
        halvings=max(saved_halvings, facts.halvings),
        ran_out_of_memory=facts.halvings > saved_halvings,
        size=facts.size,
        replicas=choice.parallel.replicas,
        gradient_messages=messages[0],
        decisions=(
            Decision("dtype", *dtype),
            Decision("strategy", choice.parallel.kind, choice.reason),
            *_mesh(setup.ranks, choice),
            Decision("memory", gib(choice.estimate.total(choice.tokens)), choice.table),
            _activation_checkpointing(run, choice, facts.size.layers),
            *([Decision("gradientMessages", *messages)] if run.world.size > 1 else []),
        ),
    )


def gradient_messages(run: RunConfig, strategy: Strategy, *, half: bool) -> tuple[GradientFormat, str]:
    """Returns the number format in which gradients are sent, and why. `half` says whether products
    are computed in bfloat16.

    The gradient of a matrix is then computed in bfloat16, too, so of a single micro-batch nothing
    is lost when it is sent. Those of adapters are small.
    """
    option = run.training.gradient_messages
    if strategy != "ddp":
        return "float32", f"{strategy} sends them in float32"
    if option != "auto":
        return option, "set by training.gradientMessages"
    if run.world.device == "cpu":
        return "float32", "on a CPU"
    if run.method == "full" and half:
        return "bfloat16", "all weights are trained, and gradients of matrices are computed in bfloat16"
    return "float32", "adapters have few gradients" if half else "products are computed in float32"


def _with_strategy(run: RunConfig, choice: Choice) -> RunConfig:
    update = {"strategy": choice.parallel.strategy, "offload": choice.parallel.offload}
    return run.model_copy(update={"world": run.world.model_copy(update=update)})


def _with_saved_strategy(user_choice: UserChoice, saved: CheckpointState | None, ranks: int) -> UserChoice:
    """A checkpoint of fsdp without a mesh is older than meshes of two dimensions."""
    if saved is not None and saved.strategy == "fsdp":
        user_choice = replace(user_choice, mesh=saved.mesh or (1, ranks))
    if user_choice.strategy != "auto" or saved is None or not saved.strategy:
        return user_choice
    return replace(user_choice, strategy=saved.strategy, offload=saved.offload, from_checkpoint=True)


def _mesh(ranks: int, choice: Choice) -> tuple[Decision, ...]:
    """Returns the decision on the mesh if fsdp runs on several nodes: copies of the model, and
    processes that share one."""
    if not choice.mesh_reason:
        return ()
    replicas = choice.parallel.replicas
    return (Decision("mesh", f"{replicas} x {ranks // replicas}", choice.mesh_reason),)


def _micro_batch_tokens(run: RunConfig, choice: Choice, saved: CheckpointState | None) -> tuple[int, str]:
    """A resumed run keeps them, so that sums are rounded alike."""
    if run.training.micro_batch_size == "auto" and saved is not None and saved.micro_tokens:
        return saved.micro_tokens, "the checkpoint was computed with it"
    return choice.tokens, choice.tokens_reason


def _activation_checkpointing(run: RunConfig, choice: Choice, layers: int) -> Decision:
    setting, recompute = run.training.activation_checkpointing, choice.parallel.recompute
    reason = "set by training.activationCheckpointing" if setting != "auto" else "activations fit"
    if setting == "auto" and recompute:
        reason = "otherwise the activations wouldn't fit"
    if recompute.keeps_attention:
        kind = f"selective, {recompute.layers(layers)} of {layers} layers, except attention"
    else:
        kind = "on" if recompute else "off"
    return Decision("activationCheckpointing", kind, reason)
