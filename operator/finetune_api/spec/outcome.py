"""Defines spec.checkpoint, spec.output, spec.evaluation and spec.runPolicy.

They specify what is saved and measured, and how a job may end.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import Model, Rule
from finetune_api.spec.inputs import SecretRef
from finetune_api.spec.rules import clean_uri


class CheckpointSpec(Model):
    """Specifies how often the training state is saved, so that a restart loses little."""

    every: s.AutoOrPositive = Field(
        default="auto",
        description="Optimizer steps between checkpoints. auto saves one after every tenth of the run, but none while "
        "training has spent more than 3% of its time waiting for checkpoints, and in any case 10 minutes after the "
        "last one.",
    )
    keep: int = Field(default=2, ge=1, le=100, description="Checkpoints kept in the output while training.")
    shards: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="With zero1, zero2, zero3 and fsdp, let every process write its own shard of the trained weights "
        "and of their optimizer state instead of gathering them on one. Any number of processes and any strategy can "
        "resume from shards. auto does so from 256 MiB on; a smaller state is one file, and that of ddp always is.",
    )


DeletionPolicy = Literal["Retain", "DeleteCheckpoints", "Delete"]


class OutputSpec(Model):
    """Specifies where the result is written."""

    uri: s.OutputUri = Field(
        description="Folder for the adapter or the model: s3://bucket/prefix, gs://bucket/prefix, "
        "az://container/prefix, pvc://claim/path, or volume://name/path for a writable claim of pod.volumes. The files "
        "are written directly into it. A folder that contains another job's result is rejected."
    )
    credentials_ref: SecretRef | None = Field(default=None, description="Secret with the credentials for uri.")
    existing: Literal["resume", "discard"] = Field(
        default="resume",
        description="What a job does with what a deleted FineTuneJob of the same namespace and name has left in uri. "
        "resume continues from its checkpoints if model, dataset, method and training are the same, and fails if they "
        "aren't. discard deletes its checkpoints and its result, and starts from the beginning. What another job has "
        "left is never touched.",
    )
    hold_seconds: int = Field(
        default=14400, ge=0, le=604800,
        description="Seconds for which a pod holds a finished result that the storage doesn't accept, because it "
        "refuses the credentials, is full or doesn't respond. The upload is tried again every 30 s with the "
        "credentials that the Secret has by then. After that the attempt fails with ResultNotStored: the result is "
        "lost, and the next attempt trains the steps since the last stored checkpoint again.",
    )  # fmt: skip
    deletion_policy: DeletionPolicy = Field(
        default="Retain",
        description="What happens to the files in uri when this FineTuneJob is deleted. Retain leaves all of them; if "
        "that is only its claim, any job can use uri next. DeleteCheckpoints deletes its checkpoints and its claim. "
        "Delete also deletes its result and its report. A pod without GPUs does this after the job's pods have "
        "stopped, with the job's credentials; until it has ended, the FineTuneJob has a finalizer. An Event says what "
        "was deleted, or what is left and why: the FineTuneJob is removed even if the files can't be deleted. What "
        "another job has stored is never touched.",
    )
    merge: bool = Field(
        default=False,
        description="Also write base and adapter merged into one model, to the folder merged/ next to the adapter. "
        "Needs as much additional resources.scratch as the base is large.",
    )

    rules = (
        clean_uri(),
    )  # fmt: skip


class GenerationSpec(Model):
    """Specifies how answers are generated. The model's own generation_config is never used, so that
    scores of different models can be compared."""

    temperature: float = Field(
        default=0.0, ge=0, le=2,
        description="0 always takes the most likely token (greedy); above 0, tokens are sampled, seeded by "
        "training.seed.",
    )  # fmt: skip
    top_p: float = Field(
        default=1.0, gt=0, le=1,
        description="Sample from the most likely tokens whose probabilities add up to this. 1 means all tokens.",
    )  # fmt: skip
    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        le=10,
        description="Above 1, tokens that have occurred already become less likely. 1 means no penalty.",
    )

    rules = (
        Rule("topP", "needs a temperature above 0, because at 0 nothing is sampled",
             "self.topP == 1.0 || self.temperature > 0.0",
             lambda m: m.top_p == 1.0 or m.temperature > 0.0),
    )  # fmt: skip


class EvaluationSpec(Model):
    """Specifies what is measured on the test rows besides the loss, before and after training."""

    metrics: Annotated[tuple[Literal["rouge", "bleu", "exactMatch", "f1"], ...], Field(max_length=4)] = Field(
        default=(),
        description="Scores of generated answers against the reference answers in the rows. rouge: ROUGE-1, ROUGE-2 "
        "and ROUGE-L (F-measure, 0 to 1); bleu: corpus BLEU (0 to 100); exactMatch: share of answers that are equal "
        "except for white space; f1: mean word overlap, as in SQuAD. Perplexity is always measured.",
    )
    rows: int = Field(
        default=200, ge=1, le=10000,
        description="Maximum number of test rows to answer for metrics, spread evenly over all test rows.",
    )  # fmt: skip
    samples: int = Field(
        default=0, ge=0, le=1000,
        description="Test prompts to answer before and after training, for people to read in report.html.",
    )  # fmt: skip
    max_new_tokens: int = Field(
        default=64, ge=1, le=4096, description="Maximum length of a generated answer, in tokens."
    )
    generation: GenerationSpec = Field(default_factory=GenerationSpec, description="How answers are generated.")

    rules = (
        Rule("metrics", "lists a metric twice; list each once",
             "self.metrics.all(m, self.metrics.exists_one(other, other == m))",
             lambda m: len(set(m.metrics)) == len(m.metrics)),
    )  # fmt: skip

    @property
    def max_answered_rows(self) -> int:
        """The maximum number of test rows for which answers are generated."""
        return max(self.samples, self.rows if self.metrics else 0)


class MaxRestartsSpec(Model):
    """Limits how many times the group is restarted for each cause."""

    application: int = Field(default=1, ge=0, le=1000, description="Failures of the training program itself.")
    memory: int = Field(
        default=4, ge=0, le=1000,
        description="Lacks of memory. Each of these restarts halves the micro-batches. A job whose largest "
        "micro-batch is a single example fails without another restart.",
    )  # fmt: skip
    infrastructure: int = Field(default=20, ge=0, le=1000, description="Failures of nodes, network and storage.")
    preemption: int = Field(
        default=1000, ge=0, le=100000, description="Evictions and preemptions by the cluster; none of them costs more "
        "than the steps since the last checkpoint."
    )  # fmt: skip


class RunPolicySpec(Model):
    """Specifies the life cycle of a job."""

    suspend: bool = Field(
        default=False, description="true saves a checkpoint and removes the pods; false resumes from there."
    )
    queue_name: s.QueueName = Field(
        default="",
        description="LocalQueue of Kueue that admits the training pods, all of them at once. The preflight pod, which "
        "needs no GPU, isn't queued. Empty means none. It can be changed only if the job was suspended before.",
    )
    scheduling_timeout_seconds: int = Field(
        default=600, ge=0, le=86400,
        description="Seconds for which a group without a queue may hold a part of the nodes that it needs, counted "
        "from the last pod that got one. It then gives them back, so that another group can run, and tries again "
        "after a growing back-off, which counts as no restart. 0 means that it holds them forever.",
    )  # fmt: skip
    preflight: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Check model, data and output in a small pod without GPUs before GPUs are allocated. auto does so "
        "if the job requests GPUs; otherwise the same checks run in the training pods.",
    )
    preflight_seconds: int = Field(
        default=14400, ge=1, le=604800,
        description="Seconds that the preflight pod may take, from its start; at most activeDeadlineSeconds. The job "
        "then fails and names the file that is being downloaded, or what is being read. A change applies to the next "
        "preflight pod.",
    )  # fmt: skip
    max_restarts: MaxRestartsSpec = Field(
        default_factory=MaxRestartsSpec, description="Maximum number of restarts of the whole group, by cause."
    )
    retry: int = Field(
        default=0,
        ge=0,
        le=1000000,
        description="Raise it to try a failed job again: it resumes from its last checkpoint, with new restart "
        "budgets. On a job that hasn't failed, it has no effect. It can't be lowered.",
    )
    active_deadline_seconds: int = Field(
        default=0,
        ge=0,
        le=31536000,
        description="Seconds after which a job that hasn't finished fails, from the creation of its first training "
        "pods; the checks before have preflightSeconds. The time for which it is suspended, queued or failed doesn't "
        "count. 0 means never.",
    )
    stall_seconds: int = Field(
        default=600, ge=0, le=86400,
        description="Seconds without any progress after which an attempt is stopped and restarted. 0 means never.",
    )  # fmt: skip
    ttl_seconds_after_finished: int = Field(
        default=0, ge=0, le=31536000,
        description="Seconds from the end of the job until its pods are removed; the FineTuneJob stays. "
        "0 means never.",
    )  # fmt: skip
