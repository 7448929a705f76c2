"""Defines spec.method and spec.training: what is trained, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import Model, Rule

GradientFormat = Literal["float32", "bfloat16"]
"""A number format in which gradients are sent."""


class LoraSpec(Model):
    """Configures low-rank adapters (Hu et al. 2021): a weight's update is (alpha / rank) * B A."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank of the update. 1 to 1024.")
    alpha: int = Field(
        default=32, ge=1, le=4096, description="Scale of the update, which is multiplied by alpha / rank. 1 to 4096."
    )
    dropout: float = Field(
        default=0.05, ge=0, lt=1, description="Dropout before the first matrix. At least 0, less than 1."
    )
    target_modules: Annotated[tuple[s.ModuleName, ...], Field(min_length=1, max_length=64)] = Field(
        default=("q_proj", "v_proj"),
        description="Names of the linear layers that get an adapter, as in the model's code; all-linear means all of "
        "them except the output layer.",
    )
    plus_ratio: float | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="LoRA+ (Hayou et al. 2024): the learning rate of B divided by that of A, which is learningRate. 1 "
        "to 1000, usually 16. Empty means that both have the same rate.",
    )
    rank_stabilized: bool = Field(
        default=False,
        description="rsLoRA (Kalajdzievski 2023): the update is multiplied by alpha / sqrt(rank), so that adapters of "
        "a high rank still learn.",
    )
    dora: bool = Field(
        default=False,
        description="DoRA (Liu et al. 2024): magnitude and direction of every column of the adapted weight are trained "
        "separately. Slower; often better at low ranks.",
    )
    init: Literal["default", "pissa", "olora"] = Field(
        default="default",
        description="Initialization of the matrices. default starts from the unchanged base; pissa (Meng et al. 2024) "
        "and olora (Büyükakyüz 2024) take the principal part out of the weight and train that. Their result is written "
        "as an adapter of twice the rank, which fits the original base.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none",
        description="Biases that are trained too: none, all, or only those of the adapted layers (lora_only).",
    )
    modules_to_save: Annotated[tuple[s.ModuleName, ...], Field(max_length=16)] = Field(
        default=(),
        description="Names of modules that are trained in full and written with the adapter, e.g. lm_head or "
        "embed_tokens. An output layer that is tied to the embeddings stays tied.",
    )
    added_tokens: Annotated[tuple[s.AddedToken, ...], Field(max_length=256)] = Field(
        default=(),
        description="Tokens to add to the tokenizer if it lacks them, e.g. <tool>. Their rows of the embeddings and of "
        "the output layer are trained and written with the adapter; all other rows stay unchanged.",
    )

    rules = (
        Rule("init", "must be default with dora, because the result of the others wouldn't fit the original base",
             "self.init == 'default' || !self.dora", lambda m: m.init == "default" or not m.dora),
    )  # fmt: skip


class FullSpec(Model):
    """Selects the weights that full training trains.

    Patterns are globs over the weight names in the model's files.
    """

    trainable: Annotated[tuple[s.WeightGlob, ...], Field(max_length=64)] = Field(
        default=(), description="Patterns of the weights to train. Empty means all."
    )
    freeze: Annotated[tuple[s.WeightGlob, ...], Field(max_length=64)] = Field(
        default=(),
        description="Patterns of the weights to freeze, such as model.embed_tokens.* and model.layers.[0-7].*; they "
        "take precedence over trainable.",
    )


class MethodSpec(Model):
    """Specifies what is trained: low-rank adapters, or the weights themselves."""

    type: Literal["lora", "full"] = Field(
        description="lora trains adapters on a frozen base; full trains the model itself."
    )
    lora: LoraSpec | None = Field(default=None, description="Settings of the adapters. Required if type is lora.")
    full: FullSpec | None = Field(
        default=None, description="Which weights are trained if type is full. Empty means all."
    )

    rules = (
        Rule("lora", "is required when type is lora; {} means the defaults",
             "self.type != 'lora' || has(self.lora)", lambda m: m.type != "lora" or m.lora is not None),
        Rule("lora", "has no meaning when type is full; remove it",
             "self.type != 'full' || !has(self.lora)", lambda m: m.type != "full" or m.lora is None),
        Rule("full", "has no meaning when type is lora; remove it",
             "self.type != 'lora' || !has(self.full)", lambda m: m.type != "lora" or m.full is None),
    )  # fmt: skip


class AdamSpec(Model):
    """Sets the constants of AdamW, also with 8-bit moments and for weights muon leaves to AdamW."""

    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment. At least 0, less than 1.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the second moment. At least 0, less than 1.")
    epsilon: float = Field(
        default=1e-8, gt=0, le=1, description="Added to the square root of the second moment. More than 0, at most 1."
    )


class EarlyStoppingSpec(Model):
    """Stops training when the validation loss no longer falls."""

    patience: int = Field(
        default=3, ge=1, le=1000, description="Evaluations without a lower validation loss before training stops."
    )


class LossSpikeSpec(Model):
    """Specifies what to do when the training loss jumps far above recent losses and stays there."""

    action: Literal["report", "rollback", "fail"] = Field(
        default="report",
        description="report records the spike (Event, metric) and takes no action; rollback restores the checkpoint "
        "before the spike and skips the steps taken since; fail ends the job with reason LossSpike.",
    )
    max_rollbacks: int = Field(
        default=3, ge=0, le=1000, description="Number of rollbacks after which another spike ends the job."
    )


class DpoSpec(Model):
    """Configures direct preference optimization (Rafailov et al. 2023)."""

    beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="How strongly the tuned model is kept close to the base; larger means closer. More than 0, at most "
        "100.",
    )


class TrainingSpec(Model):
    """Specifies the training recipe."""

    objective: Literal["supervised", "dpo"] = Field(
        default="supervised",
        description="supervised trains on the answers; dpo trains the model to prefer the chosen answer of a row to "
        "the rejected one, with the base as the reference model.",
    )
    dpo: DpoSpec | None = Field(default=None, description="Settings of objective dpo. Empty means beta 0.1.")
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Passes over the data. Set either epochs or maxSteps; 3 epochs if neither is set.",
    )
    max_steps: int | None = Field(
        default=None, ge=1, le=100000000, description="Optimizer steps. Set either epochs or maxSteps."
    )
    global_batch_size: int = Field(
        default=64, ge=1, le=1048576,
        description="Examples per optimizer step on all processes together, whatever their number.",
    )  # fmt: skip
    micro_batch_size: s.AutoOrPositive = Field(
        default="auto",
        description="Examples (with packing: sequences of maxSequenceLength tokens) that one process computes at a "
        "time. auto uses as many as fit into memory. It affects speed and memory, never the result.",
    )
    activation_checkpointing: Literal["auto", "selective", "always", "never"] = Field(
        default="auto",
        description="Recompute the activations of each layer in the backward pass instead of keeping them: a quarter "
        "to a third more work for much less memory. selective keeps the output of attention, which takes the longest "
        "to recompute if rows are long. auto recomputes only if activations don't fit, on GPUs in as few layers as "
        "memory requires.",
    )
    compile: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Compile the layers of the model with PyTorch Inductor before training: with ddp, and on GPUs "
        "also with fsdp. auto does so in bfloat16 if the run is long enough to pay for it. If the first micro-batch "
        "can't be compiled, the layers run uncompiled, and the decision compile says why.",
    )
    gradient_messages: Literal["auto", GradientFormat] = Field(
        default="auto",
        description="Number format in which strategy ddp sends gradients between processes; they are added up in "
        "float32. bfloat16 sends half of the bytes and rounds each gradient and each mean to 8 bits. auto is bfloat16 "
        "in full training on GPUs that computes in bfloat16, and otherwise float32, which the other strategies always "
        "use.",
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="Peak learning rate. More than 0, at most 1.")
    scheduler: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = Field(
        default="constant",
        description="Learning rate schedule after warmup: constant; linear or cosine decay to the minimum; wsd is "
        "constant and decays in the last steps (decayRatio); inverse_sqrt decays with the square root of the step.",
    )
    min_learning_rate_ratio: float = Field(
        default=0,
        ge=0,
        le=1,
        description="Final learning rate of linear, cosine and wsd, as a share of learningRate. 0 to 1.",
    )
    decay_ratio: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of all steps in which scheduler wsd decays the learning rate. 0 to 1.",
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="Share of all steps in which the learning rate rises from 0 to its peak. 0 to 1.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"] = Field(
        default="adamw",
        description="adamw is AdamW; adamw_8bit stores its moments in 8 bits; paged_adamw_8bit also moves them to host "
        "memory when GPU memory runs short; adafactor stores second moments per row and column only; muon "
        "orthogonalizes the updates of matrices. All except adamw need strategy ddp.",
    )
    adam: AdamSpec | None = Field(
        default=None, description="Constants of AdamW. Empty means betas 0.9 and 0.999, epsilon 1e-8."
    )
    weight_decay: float = Field(default=0.001, ge=0, le=1, description="Decoupled weight decay. 0 to 1.")
    max_grad_norm: float = Field(
        default=0.3,
        ge=0,
        le=1000000,
        description="Gradients are clipped to this global L2 norm. 0 means no clipping.",
    )
    group_by_length: bool = Field(
        default=False,
        description="Build each step from examples of similar length, which saves padding if packing is off. Every "
        "example still occurs once per epoch, and the order of the steps is random.",
    )
    eval_every_steps: int = Field(
        default=500, ge=0, le=100000000,
        description="Optimizer steps between evaluations on the validation rows. 0 means only at the end.",
    )  # fmt: skip
    early_stopping: EarlyStoppingSpec | None = Field(
        default=None,
        description="Stop when the validation loss no longer falls. Empty means never. Needs validation rows.",
    )
    keep_best: bool = Field(
        default=True,
        description="Write the weights with the lowest validation loss instead of the last ones. Without validation "
        "rows the last ones are written.",
    )
    max_skipped_steps: int = Field(
        default=10,
        ge=0,
        le=1000000,
        description="A step whose loss or gradient isn't finite is skipped, and training continues with the next one. "
        "More than this many, or 3 in a row, end the attempt with reason NonFiniteLoss. 0 means that the first one "
        "does.",
    )
    loss_spike: LossSpikeSpec = Field(default_factory=LossSpikeSpec, description="What to do after a loss spike.")
    seed: int = Field(
        default=42, ge=0, le=4294967295, description="Seed of data order, adapter initialization and dropout."
    )

    rules = (
        Rule("maxSteps", "must not be set together with epochs",
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
