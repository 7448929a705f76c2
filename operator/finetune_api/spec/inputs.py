"""Defines spec.model, which training starts from, and the reference to a Secret."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import Model, Rule
from finetune_api.spec.rules import clean_uri, not_yet


class SecretRef(Model):
    """Refers to a Secret in the job's own namespace."""

    name: s.SecretName = Field(
        description="Name of a Secret in the job's namespace. Its keys are mounted into the pods as files; the "
        "operator never reads it. Known keys: for hf:// HF_TOKEN; for s3:// AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
        "AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL; for gs:// GOOGLE_APPLICATION_CREDENTIALS (the JSON key of a "
        "service account), GOOGLE_BASE_URL; for az:// AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY, "
        "AZURE_STORAGE_SAS_TOKEN or AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET, "
        "AZURE_STORAGE_ENDPOINT, AZURE_AUTHORITY_HOST; spec.tracking lists those of the trackers. With an identity of "
        "the pod, a Secret may have just the place: AWS_REGION, AWS_ENDPOINT_URL or AZURE_STORAGE_ACCOUNT. The "
        "administrator can restrict names (tenants.secrets) and endpoints (allowedEndpoints)."
    )


class StartCheckpointSpec(Model):
    """Specifies a checkpoint, or an adapter, of another job from which training starts.

    Its files must have the digests in their manifest. Its signature isn't checked, because only the
    other job's own pods have that key: naming the place means trusting it.
    """

    uri: s.OutputUri = Field(
        description="output.uri of the other job. Its checkpoints are deleted when it succeeds; its result then has "
        "the weights."
    )
    step: int | None = Field(
        default=None,
        ge=1,
        le=100000000,
        description="Continue from the checkpoint after this optimizer step. Empty means the newest one, or, with use "
        "weights, the adapter if there is one.",
    )
    use: Literal["trainingState", "weights"] = Field(
        default="trainingState",
        description="trainingState continues the other job: with its weights, its optimizer state and its position in "
        "the data. model, dataset, method, and training must be the same except for epochs, maxSteps, learningRate, "
        "scheduler, minLearningRateRatio, decayRatio, warmupRatio, evalEverySteps, earlyStopping, keepBest, "
        "maxSkippedSteps, lossSpike and what affects speed only; with the same values, the result is the one that the "
        "other job would have had. weights starts anew from its weights, with other data or another recipe: only the "
        "base, the quantization and the method must be the same, dropout and plusRatio excepted.",
    )
    credentials_ref: SecretRef | None = Field(
        default=None,
        description="Secret with the credentials for uri. Empty means anonymous access or the pod's identity.",
    )

    rules = (
        clean_uri(),
    )  # fmt: skip


class BaseModelSpec(Model):
    """Specifies the model that training starts from."""

    uri: s.ModelUri = Field(
        description="Location of the base model: hf://owner/name, s3://bucket/prefix, gs://bucket/prefix, "
        "az://container/prefix, pvc://claim/path, or volume://name/path for a volume of pod.volumes. A folder with "
        "config.json, safetensors weights and a tokenizer."
    )
    revision: s.Revision | None = Field(
        default=None,
        description="Branch, tag or commit of an hf:// model. Empty means the default branch. status.model.revision is "
        "the commit that it resolved to.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Data type of the weights in memory. auto probes the hardware and picks bfloat16 if that is fast, "
        "else float32. LoRA matrices are always float32.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none",
        description="Store the linear layers of the frozen base in 8 bits (int8) or in 4 bits (nf4, as in QLoRA), by "
        "bitsandbytes. Needs method.type lora.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that ships with the model. Only an administrator may allow it.",
    )
    allowed_licenses: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=100)], ...], Field(max_length=64)
    ] = Field(
        default=(),
        description="Licenses that the model may have, as model READMEs name them (apache-2.0, mit, llama3, …; "
        "unknown stands for a model that names none). Empty means any. The operator may have its own list.",
    )
    credentials_ref: SecretRef | None = Field(
        default=None,
        description="Secret with the credentials for uri. Empty means anonymous access or the pod's identity.",
    )
    checkpoint: StartCheckpointSpec | None = Field(
        default=None,
        description="Checkpoint or adapter of another job from which training starts. Empty means the base itself.",
    )

    rules = (
        clean_uri(),
        not_yet("dtype", "self.dtype != 'float16'", lambda m: m.dtype != "float16",
                 "float16", "use auto, bfloat16 or float32"),
        not_yet("trustRemoteCode", "!self.trustRemoteCode", lambda m: not m.trust_remote_code,
                 "code that ships with a model", "use a model of a family that Transformers has"),
        Rule("revision", "is for hf:// models only; for other locations the digest of the content is recorded",
             "!has(self.revision) || self.uri.startsWith('hf://')",
             lambda m: m.revision is None or m.uri.startswith("hf://")),
    )  # fmt: skip
