"""spec.method and spec.training: what is trained, and how. Put together in `resource`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.model import Model, Rule


class LoraSpec(Model):
    """Low-rank adapters (Hu et al. 2021): the update of a weight is (alpha / rank) * B A."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank of the update. 1 to 1024.")
    alpha: int = Field(default=32, ge=1, le=4096, description="Scale of the update: it is multiplied by alpha / rank.")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout before the first matrix. 0 to below 1.")
    target_modules: Annotated[tuple[s.ModuleName, ...], Field(min_length=1, max_length=64)] = Field(
        default=("q_proj", "v_proj"),
        description="Names of the linear layers that get an adapter, as in the model's code; all-linear means "
        "every one but the output layer.",
    )
    plus_ratio: float | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="LoRA+ (Hayou et al. 2024): B learns so many times as fast as A, whose rate is learningRate. 1 to "
        "1000, usually 16. Empty means alike.",
    )
    rank_stabilized: bool = Field(
        default=False,
        description="rsLoRA (Kalajdzievski 2023): the update is multiplied by alpha / sqrt(rank), so that a high "
        "rank still learns.",
    )
    dora: bool = Field(
        default=False,
        description="DoRA (Liu et al. 2024): the length of every column of the adapted weight learns apart from its "
        "direction. Slower; often better at low ranks.",
    )
    init: Literal["default", "pissa", "olora"] = Field(
        default="default",
        description="Where the matrices begin: default is the base unchanged; pissa (Meng et al. 2024) and olora "
        "(Büyükakyüz 2024) take the weight's principal part out of it and train that. Written as an adapter of "
        "twice the rank, which fits the base as it was.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Which biases are trained too: none, all, or those of adapted layers (lora_only)."
    )
    modules_to_save: Annotated[tuple[s.ModuleName, ...], Field(max_length=16)] = Field(
        default=(),
        description="Names of modules that are trained whole and written with the adapter, e.g. lm_head or "
        "embed_tokens. An output layer that is tied to the embeddings stays tied.",
    )
    added_tokens: Annotated[tuple[s.AddedToken, ...], Field(max_length=256)] = Field(
        default=(),
        description="Tokens that the tokenizer gets where it lacks them, e.g. <tool>. Their rows of the embeddings and "
        "of the output layer learn and are written with the adapter; all other rows stay.",
    )

    rules = (
        Rule("init", "pissa and olora can't be written for the base as it was together with dora; use default",
             "self.init == 'default' || !self.dora", lambda m: m.init == "default" or not m.dora),
    )  # fmt: skip


class FullSpec(Model):
    """Which weights learn in full training. Patterns are globs over the names in the model's files."""

    trainable: Annotated[tuple[s.WeightGlob, ...], Field(max_length=64)] = Field(
        default=(), description="Only weights that one of these patterns matches learn. Empty means all."
    )
    freeze: Annotated[tuple[s.WeightGlob, ...], Field(max_length=64)] = Field(
        default=(), description="Weights that stay as they are, e.g. model.embed_tokens.* or model.layers.[0-7].*"
    )


class MethodSpec(Model):
    """What is trained: low-rank adapters, or all weights."""

    type: Literal["lora", "full"] = Field(description="lora trains adapters beside a frozen base; full trains all.")
    lora: LoraSpec | None = Field(default=None, description="Settings of the adapters. Required with type lora.")
    full: FullSpec | None = Field(default=None, description="Which weights learn. Empty means all.")

    rules = (
        Rule("lora", "is required when type is lora ({} takes the defaults)",
             "self.type != 'lora' || has(self.lora)", lambda m: m.type != "lora" or m.lora is not None),
        Rule("lora", "has no meaning when type is full; remove it",
             "self.type != 'full' || !has(self.lora)", lambda m: m.type != "full" or m.lora is None),
        Rule("full", "has no meaning when type is lora; remove it",
             "self.type != 'lora' || !has(self.full)", lambda m: m.type != "lora" or m.full is None),
    )  # fmt: skip


class AdamSpec(Model):
    """Of AdamW, with moments in 8 bits too, and of the weights that muon leaves to it."""

    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment. 0 to below 1.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the second moment. 0 to below 1.")
    epsilon: float = Field(default=1e-8, gt=0, le=1, description="Added to the root of the second moment.")


class EarlyStoppingSpec(Model):
    """Stop when the eval loss no longer falls."""

    patience: int = Field(
        default=3, ge=1, le=1000, description="Evaluations without a better eval loss before it stops."
    )


class LossSpikeSpec(Model):
    """What to do when the training loss leaves the ones before behind and doesn't come back at once."""

    action: Literal["report", "rollback", "fail"] = Field(
        default="report",
        description="report tells it (event, metric) and changes nothing; rollback goes back to the checkpoint before "
        "it and passes over the steps since; fail ends the job with reason LossSpike.",
    )
    max_rollbacks: int = Field(default=3, ge=0, le=1000, description="Rollbacks before the next spike ends the job.")


class DpoSpec(Model):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="How hard the tuned model is held to the base: the larger, the closer. More than 0, at most 100.",
    )


class TrainingSpec(Model):
    """The recipe."""

    objective: Literal["supervised", "dpo"] = Field(
        default="supervised",
        description="supervised learns the answers; dpo learns to prefer a row's chosen answer to its rejected one; "
        "the base is the reference.",
    )
    dpo: DpoSpec | None = Field(default=None, description="Settings of objective dpo. Empty means beta 0.1.")
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Passes over the data. Either epochs or maxSteps; 3 if neither.",
    )
    max_steps: int | None = Field(
        default=None, ge=1, le=100000000, description="Optimizer steps. Either epochs or maxSteps."
    )
    global_batch_size: int = Field(
        default=64, ge=1, le=1048576,
        description="Examples per optimizer step, whatever the number of GPUs.",
    )  # fmt: skip
    micro_batch_size: s.AutoOrPositive = Field(
        default="auto",
        description="Examples (with packing: rows of maxSequenceLength tokens) that one GPU computes at once. auto "
        "takes what fits. It changes speed and memory, never the result.",
    )
    activation_checkpointing: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Compute a layer's activations again in the backward pass instead of keeping them: a quarter to a "
        "third more work for much less memory. auto does so only where they don't fit.",
    )
    compile: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Compile the model's layers with PyTorch's inductor before training. auto does so where a gain was "
        "measured (CPUs that are fast in bfloat16) and the run is long enough to win the time back.",
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="Peak learning rate. More than 0, at most 1.")
    scheduler: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = Field(
        default="constant",
        description="Course of the learning rate after warm-up: constant; linear or cosine to its minimum; wsd is "
        "constant and falls in the last steps (decayRatio); inverse_sqrt falls with the root of the step.",
    )
    min_learning_rate_ratio: float = Field(
        default=0,
        ge=0,
        le=1,
        description="Where linear, cosine and wsd end, as a share of learningRate. 0 to 1.",
    )
    decay_ratio: float = Field(
        default=0.1, ge=0, le=1, description="With scheduler wsd: share of all steps in which the rate falls. 0 to 1."
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="Share of all steps in which the learning rate rises from 0. 0 to 1.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"] = Field(
        default="adamw",
        description="adamw is AdamW; adamw_8bit keeps its moments in 8 bits, paged_adamw_8bit also moves them to the "
        "host's memory where a GPU's runs short; adafactor keeps second moments by row and column only; muon makes "
        "the updates of matrices orthogonal. All but adamw need strategy ddp.",
    )
    adam: AdamSpec | None = Field(
        default=None, description="Constants of AdamW. Empty means betas 0.9 and 0.999, epsilon 1e-8."
    )
    weight_decay: float = Field(default=0.001, ge=0, le=1, description="Decoupled weight decay. 0 to 1.")
    max_grad_norm: float = Field(
        default=0.3,
        ge=0,
        le=1000000,
        description="Gradients are scaled down to this global norm. 0 means never.",
    )
    group_by_length: bool = Field(
        default=False,
        description="Steps are made of examples of like length, which saves padding where packing is off. Every "
        "example still comes once an epoch, in a random order of steps.",
    )
    eval_every_steps: int = Field(
        default=500, ge=0, le=100000000,
        description="Optimizer steps between evaluations on the validation rows. 0 means only at the end.",
    )  # fmt: skip
    early_stopping: EarlyStoppingSpec | None = Field(
        default=None,
        description="Stop when the eval loss no longer falls. Empty means never. Needs validation rows.",
    )
    keep_best: bool = Field(
        default=True,
        description="Write the weights with the lowest eval loss instead of the last ones. Without validation rows "
        "the last ones are written.",
    )
    max_skipped_steps: int = Field(
        default=10,
        ge=0,
        le=1000000,
        description="Steps whose loss or gradient isn't finite are refused, and training goes on with the next; more "
        "of them than this, or 3 in a row, end the attempt with reason NonFiniteLoss. 0 ends it at the first.",
    )
    loss_spike: LossSpikeSpec = Field(default_factory=LossSpikeSpec, description="What a loss spike leads to.")
    seed: int = Field(
        default=42, ge=0, le=4294967295, description="Seed of data order, adapter initialisation and dropout."
    )

    rules = (
        Rule("maxSteps", "give either epochs or maxSteps, not both",
             "!(has(self.epochs) && has(self.maxSteps))", lambda m: m.epochs is None or m.max_steps is None),
        Rule("dpo", "has no meaning with objective supervised; remove it",
             "!has(self.dpo) || self.objective == 'dpo'", lambda m: m.dpo is None or m.objective == "dpo"),
        Rule("adam", "has no meaning with optimizer adafactor; remove it",
             "!has(self.adam) || self.optimizer != 'adafactor'",
             lambda m: m.adam is None or m.optimizer != "adafactor"),
        Rule("minLearningRateRatio", "needs scheduler linear, cosine or wsd",
             "self.minLearningRateRatio == 0.0 || self.scheduler in ['linear', 'cosine', 'wsd']",
             lambda m: m.min_learning_rate_ratio == 0 or m.scheduler in ("linear", "cosine", "wsd")),
        Rule("microBatchSize", "must not be larger than globalBatchSize",
             "type(self.microBatchSize) != int || self.microBatchSize <= self.globalBatchSize",
             lambda m: not isinstance(m.micro_batch_size, int) or m.micro_batch_size <= m.global_batch_size),
    )  # fmt: skip
