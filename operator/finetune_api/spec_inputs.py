"""spec.model: what training starts from; and how a Secret is named. Put together in `resource`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.model import Model, Rule
from finetune_api.spec_rules import clean_uri, not_yet, reachable


class SecretRef(Model):
    """Names a Secret in the job's own namespace."""

    name: s.SecretName = Field(
        description="Name of a Secret in this namespace. Its keys are mounted as files into the pods; the operator "
        "never reads it. Known keys: HF_TOKEN; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, "
        "AWS_REGION, AWS_ENDPOINT_URL; a tracker's are told there."
    )


class BaseModelSpec(Model):
    """The model that training starts from."""

    uri: s.ModelUri = Field(
        description="Where the base model lies: hf://owner/name, s3://bucket/prefix or pvc://claim/path. A folder "
        "with config.json, safetensors weights and a tokenizer."
    )
    revision: s.Revision | None = Field(
        default=None,
        description="Branch, tag or commit of an hf:// model. Empty means the default branch; the commit that was "
        "resolved is in status.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of the weights in memory. auto probes the hardware: bfloat16 where it is fast, "
        "else float32. LoRA matrices are always float32.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none",
        description="Keep the linear layers of the frozen base in 8 bits (int8) or 4 (nf4, QLoRA's), by bitsandbytes. "
        "Needs method lora.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that ships with the model. Only an administrator may allow it.",
    )
    allowed_licenses: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=100)], ...], Field(max_length=64)
    ] = Field(
        default=(),
        description="Licences that the model may have, as its README names them (apache-2.0, mit, llama3, …; unknown "
        "for one that says nothing). Empty means any. The operator may have a list of its own.",
    )
    credentials_ref: SecretRef | None = Field(
        default=None,
        description="Secret with the credentials for uri. Empty means anonymous or the pod's identity.",
    )

    rules = (
        clean_uri(),
        reachable(),
        not_yet("dtype", "self.dtype != 'float16'", lambda m: m.dtype != "float16",
                 "float16", "use auto, bfloat16 or float32"),
        not_yet("trustRemoteCode", "!self.trustRemoteCode", lambda m: not m.trust_remote_code,
                 "code that ships with a model", "use a model of a family that transformers knows"),
        Rule("revision", "is for hf:// models only; for other places the content's digest is recorded",
             "!has(self.revision) || self.uri.startsWith('hf://')",
             lambda m: m.revision is None or m.uri.startswith("hf://")),
    )  # fmt: skip
