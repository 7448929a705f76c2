"""Defines the scalar types of the resource (URIs, quantities, names) and their patterns.

The CRD has the same patterns. They mean the same in Go's RE2 (the API server) and Rust's regex
(pydantic), so they have no \\s, \\d or \\w, which differ outside ASCII.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

# No blanks, control, bidirectional or invisible characters, and no separators of lines.
_PATH = (
    r"[^\x00-\x20\x7f-\x{9f}?#\\\x{61c}\x{200b}\x{200e}\x{200f}\x{2028}-\x{202e}\x{2060}-\x{206f}\x{feff}"
    r"\x{fff9}-\x{fffb}\x{fffe}\x{ffff}]+"
)
# Buckets of S3 and Google, and containers of Azure, whose names have no dots and underscores.
_BUCKET = r"((s3|gs)://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]|az://[a-z0-9](-?[a-z0-9]){2,62})/"
_MOUNTED = r"(pvc|volume)://[a-z0-9]([-a-z0-9]*[a-z0-9])?/"
# hf://owner/model or hf://model; s3://bucket/key, also gs:// and az://; pvc://claim/path;
# volume://name/path
MODEL_URI_PATTERN = (
    r"^(hf://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?"
    r"|" + _BUCKET + _PATH + r"|" + _MOUNTED + _PATH + r")$"
)
DATA_URI_PATTERN = (
    r"^(hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*/"
    + _PATH
    + r"|"
    + _BUCKET
    + _PATH
    + r"|"
    + _MOUNTED
    + _PATH
    + r")$"
)
OUTPUT_URI_PATTERN = r"^(" + _BUCKET + _PATH + r"|" + _MOUNTED + _PATH + r")$"
AUTO_QUANTITY_PATTERN = r"^(auto|[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?)$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"
VOLUME_NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"  # of a FineTuneJob, its pods and its Service
DNS_SUBDOMAIN_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
OPTIONAL_DNS_SUBDOMAIN_PATTERN = r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)?$"
IMAGE_PATTERN = r"^([a-zA-Z0-9][a-zA-Z0-9._/:-]*(@sha256:[0-9a-f]{64})?)?$"
QUALIFIED_NAME_PATTERN = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE_PATTERN = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
REVISION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
MODULE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_.-]*$"
VOCABULARY_PATTERN = r"^[^\x00-\x20\x7f]+$"
WEIGHT_GLOB_PATTERN = r"^[A-Za-z0-9_.*?\[\]!-]+$"
HTTP_URL_PATTERN = r"^https?://[!-\"$->A-~]+$"  # printable ASCII without #, ? and @
ENV_NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
ENV_VALUE_PATTERN = r"^[^\x00-\x1f\x7f]*$"

# The message for a text that doesn't match a pattern.
PATTERN_MESSAGES = {
    MODEL_URI_PATTERN: "must be hf://owner/name, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, "
    "pvc://claim/path or volume://name/path, without spaces, ? or #",
    DATA_URI_PATTERN: "must be s3://bucket/key, gs://bucket/key, az://container/key, pvc://claim/path, "
    "volume://name/path or hf://owner/dataset/file, without spaces, ? or #",
    OUTPUT_URI_PATTERN: "must be s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, pvc://claim/path or "
    "volume://name/path, without spaces, ? or #",
    VOLUME_NAME_PATTERN: "must be lowercase letters, digits and dashes",
    QUANTITY_PATTERN: "must be a quantity such as 16, 500m or 128Gi",
    AUTO_QUANTITY_PATTERN: "must be auto, or a quantity such as 16, 500m or 128Gi",
    DNS_SUBDOMAIN_PATTERN: "must be the name of an object: lowercase letters, digits, dashes and dots",
    OPTIONAL_DNS_SUBDOMAIN_PATTERN: "must be the name of an object: lowercase letters, digits, dashes and dots",
    QUALIFIED_NAME_PATTERN: "must be a name such as example.com/name, with at most 63 characters after the slash",
    IMAGE_PATTERN: "must be an image such as registry.example.com/trainer:tag, or with @sha256:… instead of a tag",
    LABEL_VALUE_PATTERN: "must be at most 63 letters, digits, dashes, dots and underscores",
    REVISION_PATTERN: "must be a branch, a tag or a commit",
    MODULE_PATTERN: "must be the name of a layer in the model's code, e.g. q_proj",
    VOCABULARY_PATTERN: "must be a token without spaces, e.g. <tool>",
    WEIGHT_GLOB_PATTERN: "must be a glob over weight names, e.g. model.layers.[0-3].*",
    ENV_NAME_PATTERN: "must be the name of an environment variable, e.g. NCCL_DEBUG",
    ENV_VALUE_PATTERN: "must be one line of text",
    HTTP_URL_PATTERN: "must be an http:// or https:// URL in ASCII, without @, ? and #",
    NAME_PATTERN: "must be lowercase letters, digits and dashes, starting with a letter",
}

ModelUri = Annotated[str, Field(pattern=MODEL_URI_PATTERN, max_length=1024)]
DataUri = Annotated[str, Field(pattern=DATA_URI_PATTERN, max_length=1024)]
OutputUri = Annotated[str, Field(pattern=OUTPUT_URI_PATTERN, max_length=1024)]
SecretName = Annotated[str, Field(pattern=DNS_SUBDOMAIN_PATTERN, min_length=1, max_length=253)]
ObjectName = Annotated[str, Field(pattern=OPTIONAL_DNS_SUBDOMAIN_PATTERN, max_length=253)]
QueueName = Annotated[str, Field(pattern=OPTIONAL_DNS_SUBDOMAIN_PATTERN, max_length=63)]
LabelKey = Annotated[str, Field(pattern=QUALIFIED_NAME_PATTERN, max_length=317)]
ImageName = Annotated[str, Field(pattern=IMAGE_PATTERN, max_length=512)]
RequiredLabelKey = Annotated[str, Field(pattern=QUALIFIED_NAME_PATTERN, min_length=1, max_length=317)]
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE_PATTERN, max_length=63)]
ResourceName = Annotated[str, Field(pattern=QUALIFIED_NAME_PATTERN, min_length=1, max_length=128)]
Revision = Annotated[str, Field(pattern=REVISION_PATTERN, max_length=128)]
ModuleName = Annotated[str, Field(pattern=MODULE_PATTERN, min_length=1, max_length=128)]
AddedToken = Annotated[str, Field(pattern=VOCABULARY_PATTERN, min_length=1, max_length=64)]
EnvName = Annotated[str, Field(pattern=ENV_NAME_PATTERN, min_length=1, max_length=128)]
EnvValue = Annotated[str, Field(pattern=ENV_VALUE_PATTERN, max_length=1024)]
WeightGlob = Annotated[str, Field(pattern=WEIGHT_GLOB_PATTERN, min_length=1, max_length=128)]


MAX_QUANTITY = 2**50  # the maximum of a quantity that is a bare number: 1 Pi


def _number_as_text(value: Any) -> Any:
    """Turns a number into a string, since `cpu: 16` and `cpu: "16"` mean the same."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number and 0 <= value <= MAX_QUANTITY else value


Quantity = Annotated[
    str,
    BeforeValidator(_number_as_text),
    Field(pattern=QUANTITY_PATTERN, max_length=32),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "pattern": QUANTITY_PATTERN,
            "maxLength": 32,
            "minimum": 0,
            "maximum": MAX_QUANTITY,
        }
    ),
]

AutoQuantity = Annotated[
    str,
    BeforeValidator(_number_as_text),
    Field(pattern=AUTO_QUANTITY_PATTERN, max_length=32),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "pattern": AUTO_QUANTITY_PATTERN,
            "maxLength": 32,
            "minimum": 0,
            "maximum": MAX_QUANTITY,
        }
    ),
]

MAX_COUNT = 100_000_000


def _auto_or_positive(value: Any) -> Any:
    """Returns the value if it is "auto" or an integer in range. Raises ValueError otherwise."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value == "auto" or (is_number and 1 <= value <= MAX_COUNT):
        return value
    raise ValueError(f'must be "auto" or a whole number from 1 to {MAX_COUNT}')


AutoOrPositive = Annotated[
    int | str,
    BeforeValidator(_auto_or_positive),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "pattern": "^auto$",
            "maxLength": 8,
            "minimum": 1,
            "maximum": MAX_COUNT,
        }
    ),
]

_SUFFIX = {
    "": 1.0, "m": 1e-3,
    "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60,
}  # fmt: skip


def quantity_value(quantity: str) -> float:
    """Returns a Kubernetes quantity as a number in its base unit (bytes, cores).

    Raises ValueError if the text isn't a quantity.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)", quantity)
    if match is None or match.group(2) not in _SUFFIX:
        raise ValueError(f"{quantity!r} is not a quantity such as 16, 500m or 128Gi")
    return float(match.group(1)) * _SUFFIX[match.group(2)]


def has_parent_segment(uri: str) -> bool:
    """Whether a URI's path has a segment `..` or `.` or an empty one, so that it may lead
    elsewhere.

    A single trailing slash is allowed.
    """
    path = uri.split("://", 1)[-1]
    return any(part in ("..", ".", "") for part in path.removesuffix("/").split("/"))


def is_file_name(text: str, suffix: str) -> bool:
    """Whether a text is a plain file name with that suffix."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) is not None and text.endswith(suffix)
