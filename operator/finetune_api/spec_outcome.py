"""spec.checkpoint, output, evaluation and runPolicy: what is kept and told, and how it may end. Put together
in `resource`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.model import Model, Rule
from finetune_api.spec_inputs import SecretRef
from finetune_api.spec_rules import clean_uri, not_yet, reachable


class CheckpointSpec(Model):
    """How often the state is saved, so that a restart loses little."""

    every: s.AutoOrPositive = Field(
        default="auto",
        description="Optimizer steps between checkpoints. auto is a tenth of the run and at most 10 minutes, as long "
        "as training stands still for them for at most 3 % of its time.",
    )
    keep: int = Field(default=2, ge=1, le=100, description="Checkpoints kept in the destination while training.")
    shards: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Under zero1 to zero3 and fsdp every process writes its own part of what is trained, and none "
        "gathers it; any number of processes and any strategy can go on from that. auto does so from 256 MiB on; less "
        "is gathered into one file, as always under ddp.",
    )


class OutputSpec(Model):
    """Where the result goes."""

    uri: s.OutputUri = Field(
        description="Folder for the adapter or the model: s3://bucket/prefix or pvc://claim/path. Exactly here; a "
        "folder that holds another job's result is refused."
    )
    credentials_ref: SecretRef | None = Field(default=None, description="Secret with the credentials for uri.")
    merge: bool = Field(
        default=False,
        description="Also write base and adapter merged into one model, in the folder merged/ beside the adapter. "
        "Needs as much resources.scratch again as the base has.",
    )

    rules = (
        clean_uri(),
        reachable(),
    )  # fmt: skip


class GenerationSpec(Model):
    """How answers are generated. What isn't given here isn't taken from the model's own generation_config either, so
    that scores of different models can be compared."""

    temperature: float = Field(
        default=0.0, ge=0, le=2,
        description="0 takes the likeliest token each time (greedy); above 0 tokens are drawn, by training.seed.",
    )  # fmt: skip
    top_p: float = Field(
        default=1.0, gt=0, le=1,
        description="Draw from the likeliest tokens that have this probability together. 1 is all of them.",
    )  # fmt: skip
    repetition_penalty: float = Field(
        default=1.0, gt=0, le=10, description="Above 1 makes a token that was there less likely. 1 changes nothing."
    )

    rules = (
        Rule("topP", "needs a temperature above 0; without one nothing is drawn",
             "self.topP == 1.0 || self.temperature > 0.0",
             lambda m: m.top_p == 1.0 or m.temperature > 0.0),
    )  # fmt: skip


class EvaluationSpec(Model):
    """What is measured on the test rows besides the loss, of the base model and of the result."""

    metrics: Annotated[tuple[Literal["rouge", "bleu", "exactMatch", "f1"], ...], Field(max_length=4)] = Field(
        default=(),
        description="Scores of generated answers against the rows' own. rouge: ROUGE-1, ROUGE-2 and ROUGE-L "
        "(F-measure, 0 to 1); bleu: corpus BLEU (0 to 100); exactMatch: share of answers that are the same but "
        "for white space; f1: mean overlap of words, as in SQuAD. Perplexity is always there.",
    )
    rows: int = Field(
        default=200, ge=1, le=10000,
        description="Test rows that are answered for metrics, at most; taken evenly from the whole file.",
    )  # fmt: skip
    samples: int = Field(
        default=0, ge=0, le=1000,
        description="Test prompts that are answered before and after training, for people to read in report.html.",
    )  # fmt: skip
    max_new_tokens: int = Field(default=64, ge=1, le=4096, description="Longest generated answer, in tokens.")
    generation: GenerationSpec = Field(default_factory=GenerationSpec, description="How answers are generated.")

    rules = (
        Rule("metrics", "names a metric twice; name each once",
             "self.metrics.all(m, self.metrics.exists_one(other, other == m))",
             lambda m: len(set(m.metrics)) == len(m.metrics)),
    )  # fmt: skip

    @property
    def answered(self) -> int:
        """Test rows that are answered, at most."""
        return max(self.samples, self.rows if self.metrics else 0)


class MaxRestartsSpec(Model):
    """How many failures of each cause are survived. A preemption never counts."""

    application: int = Field(default=1, ge=0, le=1000, description="Failures of the training program itself.")
    infrastructure: int = Field(default=20, ge=0, le=1000, description="Failures of nodes, network and storage.")


class RunPolicySpec(Model):
    """Life cycle."""

    suspend: bool = Field(
        default=False, description="true saves a checkpoint and removes the pods; false goes on from there."
    )
    queue_name: Annotated[str, Field(max_length=63)] = Field(
        default="", description="Kueue local queue that admits the pods. Empty means none."
    )
    preflight: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Check model, data and destination in a small pod without GPU before GPUs are taken. auto does so "
        "when GPUs are asked for; without a GPU the same checks run in the training pods.",
    )
    max_restarts: MaxRestartsSpec = Field(
        default_factory=MaxRestartsSpec, description="Restarts of the whole group, by cause."
    )
    active_deadline_seconds: int = Field(
        default=0,
        ge=0,
        le=31536000,
        description="Seconds after which an unfinished job fails. 0 means never.",
    )
    stall_seconds: int = Field(
        default=600, ge=0, le=86400,
        description="Seconds without a sign of progress after which an attempt is ended and restarted. 0 means never.",
    )  # fmt: skip
    ttl_seconds_after_finished: int = Field(
        default=0, ge=0, le=31536000,
        description="Seconds after the end when the pods are removed; the FineTuneJob stays. 0 means never.",
    )  # fmt: skip

    rules = (
        not_yet(
            "queueName",
            "self.queueName == ''",
            lambda m: m.queue_name == "",
            "a Kueue queue",
            "leave it empty",
        ),
    )
