"""Loads the model as a run was resolved, makes it trainable, and wraps it in its parallel
strategy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finetune_trainer import model_folder
from finetune_trainer.data.batching.collator import Collator
from finetune_trainer.data.dataset import Data
from finetune_trainer.model import activation_checkpointing, loading, method
from finetune_trainer.model.check import shared_rows
from finetune_trainer.model.loading import LoadedModel
from finetune_trainer.model.result import adapter_merge, weight_files
from finetune_trainer.parallel import deepspeed, deepspeed_config, fsdp, fsdp_shards, optimizers
from finetune_trainer.parallel.ddp import DataParallel
from finetune_trainer.parallel.strategy import ParallelStrategy
from finetune_trainer.training.context import RankContext
from finetune_trainer.training.resolve import ResolvedRun

_LOADING = {
    True: ("mapped", "each process copies its own rows from the mapped files"),
    False: ("by rank 0", "the files have another number format than the run, or the base is changed first"),
}
_GRADIENTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STAGES: dict[str, deepspeed_config.Stage] = {"zero1": 1, "zero2": 2, "zero3": 3}


def half(resolved: ResolvedRun) -> torch.dtype | None:
    """Returns the format of the matrix products if it isn't float32."""
    return torch.bfloat16 if resolved.half else None


def stored(resolved: ResolvedRun) -> torch.dtype:
    """Returns the format in which the base is stored. A base that is trained is float32."""
    return torch.bfloat16 if resolved.half and resolved.run.method == "lora" else torch.float32


@dataclass(frozen=True)
class WrappedModel:
    """A model that is ready to train.

    `parameters` and `trainable` count weights before they are split over ranks. `collate` pads
    rows on the right; whether examples may share a row is decided later.
    """

    loaded: LoadedModel
    strategy: ParallelStrategy
    parameters: int
    trainable: int
    collate: Collator


def load_and_wrap(context: RankContext, resolved: ResolvedRun, data: Data) -> WrappedModel:
    """Load the model of `context`, whose run must be the resolved one. All ranks call it together.

    Raises RunError for a model that can't be loaded or trained this way.
    """
    run, world = context.run, context.world
    options = _zero_options(resolved)
    if options is not None:
        deepspeed_config.prepare_environment(run.world.device)
    dtype = stored(resolved)
    mapped = _maps_files(context, dtype)
    if run.world.strategy == "fsdp":
        choice, reason = _LOADING[mapped]
        context.reporter.decision("loading", choice, reason)
    with deepspeed_config.split_while_loading(options, dtype):
        loaded = loading.load(
            context.paths.model,
            dtype=dtype,
            # What one token attends to at most: the row of a preference pair holds two answers.
            longest=0 if data.renderer.encoder_decoder else min(data.longest, run.data.max_sequence_length),
            outline=run.world.strategy == "fsdp" and not mapped and not world.is_first,
            mapped=mapped,
            quantized=method.quantized(run, world.device, dtype, context.reporter),
        )
    shared_rows.check(loaded.base.config, world.sequence.size, loaded.packing_obstacle)
    loaded = method.apply(run, context.paths.model, loaded, data.renderer.tokenizer, data.needs, context.reporter)
    if resolved.recompute:
        again = resolved.recompute
        activation_checkpointing.enable(loaded, again.share, keeps_attention=again.keeps_attention)
    parameters, trainable = loaded.parameters, loaded.trainable
    strategy = _wrapped(context, resolved, loaded)
    return WrappedModel(loaded, strategy, parameters, trainable, _collator(context, loaded, data))


def _maps_files(context: RankContext, dtype: torch.dtype) -> bool:
    """Returns whether fsdp shards the base from mapped files.

    Quantizing, PiSSA and OLoRA change the base, and added tokens its embeddings, so rank 0 does
    that once.
    """
    run = context.run
    if run.model.quantization != "none":
        return False
    changed = bool(run.added_tokens) or (run.lora is not None and run.lora.init != "default")
    formats = {tensor.format for tensor in adapter_merge.stored_tensors(context.paths.model)}
    name = next(name for name, known in weight_files.FORMATS.items() if known == dtype)
    mappable = model_folder.can_be_mapped(formats, name, trained=run.method == "full")
    return run.world.strategy == "fsdp" and mappable and not changed


def _zero_options(resolved: ResolvedRun) -> deepspeed_config.ZeroOptions | None:
    """Returns the options of DeepSpeed, or None for a strategy without it."""
    world = resolved.run.world
    stage = _STAGES.get(world.strategy)
    return None if stage is None else deepspeed_config.ZeroOptions(stage, world.offload, half(resolved), world.device)


def _wrapped(context: RankContext, resolved: ResolvedRun, loaded: LoadedModel) -> ParallelStrategy:
    run, world = context.run, context.world
    name, dtype = run.world.strategy, half(resolved)
    config = optimizers.optimizer_config(run.training, run.lora, world.device.type)
    context.reporter.decision("optimizer", config.optimizer, optimizers.reason(run.training, config, name))
    if name == "fsdp":
        offload = run.world.offload == "parameters"
        source = fsdp_shards.WeightSource(
            loaded.mapped, run.method == "lora", stored(resolved) if loaded.mapped else None
        )
        return fsdp.FullyShardedDataParallel(
            loaded.model, config, world, offload=offload, half=dtype, source=source, replicas=resolved.replicas
        )
    options = _zero_options(resolved)
    if options is None:
        return DataParallel(loaded.model, config, world, dtype, _GRADIENTS[resolved.gradient_messages])
    return deepspeed.DeepSpeedZero(loaded.model, config, world, options)


def _collator(context: RankContext, loaded: LoadedModel, data: Data) -> Collator:
    pad = data.renderer.tokenizer.pad_token_id
    if pad is None or pad >= method.capacity(loaded).embeddings:  # some tokenizers have one more token than the model
        pad = min(data.renderer.stops)
    start = getattr(loaded.base.config, "decoder_start_token_id", None)
    return Collator(
        packed=False,
        shared=False,
        encoder_decoder=loaded.encoder_decoder,
        pad_token=pad,
        decoder_start_token=pad if start is None else start,
        device=context.world.device,
    )
