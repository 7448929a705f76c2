"""Defines spec.pod.env: which environment variables a job may set, and which of them reach a rank.

An allow-list decides, because a pod holds credentials: a variable that names a library to load, or
another server for a token, would give them away. It does no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import Model, Rule

PREFIXES = (
    "NCCL_", "OFI_NCCL_", "GLOO_", "FI_", "UCX_", "RDMAV_", "IBV_", "MLX5_",
    "TORCH_", "PYTORCH_", "CUDA_", "CUBLAS_", "CUDNN_", "OMP_", "KMP_", "MKL_", "HF_",
)  # fmt: skip
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")

# Set for every pod by the operator, the supervisor or the device plugin.
_RESERVED = ("CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "OMP_NUM_THREADS")
# Each names code, or a file that names code, which would run next to the job's credentials.
_CODE = ("NCCL_CONF_FILE",)
# These connect to, or listen for, somebody whom the operator doesn't know.
_PEERS = ("NCCL_COMM_ID", "NCCL_RAS_ADDR", "HF_DEBUG", "UCX_STATS_DEST", "UCX_ERROR_MAIL_TO")
# Kinds of names, so that a new library's variables are covered too. The first names code or a
# folder in which code is looked up, such as CUDA_INJECTION64_PATH, CUDA_HOME, UCX_GDB_COMMAND,
# PYTORCH_NVCC, TORCH_ADDR2LINE_BINARY, IBV_DRIVERS and HF_MODULES_CACHE; the second turns a
# protection off, such as TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD and HF_DATASETS_TRUST_REMOTE_CODE, or
# names another server.
_NAMES_CODE = (
    "_(PATHS?|HOME|DIR|DIRS|DIRECTORY|LIBS?|LIBRARY|LIBRARIES|DRIVERS?|CACHE|EXECUTABLE|EXE|COMMAND|CMD|PRELOAD"
    "|NVCC|CXX|COMPILER|BINARY|PROGRAM|SCRIPT|SOCKET)$"
)
_UNPROTECTED = "TRUST|UNSAFE|INSECURE|ALLOW_CODE|WEIGHTS_ONLY|VERIFY|ENDPOINT|OFFLINE|TELEMETRY"

_ANY_PROXY = "|".join((*PROXIES, *(name.lower() for name in PROXIES)))
_ALLOWED = f"^(({'|'.join(PREFIXES)})[A-Za-z0-9_]+|{_ANY_PROXY})$"
_CREDENTIAL = "(^|_)(API)?KEYS?(_|$)|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL"
_REFUSED = f"^({'|'.join((*_RESERVED, *_CODE, *_PEERS))})$|{_NAMES_CODE}|{_UNPROTECTED}"


def is_allowed(name: str) -> bool:
    """Whether a job may set the variable, so that it is passed on to the ranks."""
    return re.search(_ALLOWED, name) is not None and not re.search(_REFUSED, name) and not is_credential(name)


def is_proxy(name: str) -> bool:
    """Whether the variable is that of a proxy, or of what needs none."""
    return name.upper() in PROXIES


def is_credential(name: str) -> bool:
    """Whether the variable's name is that of a credential, which never reaches a rank."""
    return re.search(_CREDENTIAL, name.upper()) is not None


def _name(message: str, cel: str, holds: Callable[[str], bool]) -> Rule:
    """Returns a rule about the variable's name."""
    return Rule("name", message, cel, lambda m: holds(m.name))


class EnvVarSpec(Model):
    """Specifies an environment variable of the pods. Names are restricted: a credential belongs in
    a Secret, and some variables would change which code is run."""

    name: s.EnvName = Field(
        description="Name. It begins with "
        + ", ".join(PREFIXES)
        + "; or it is a proxy, in capitals or lowercase: "
        + ", ".join(PROXIES)
        + "."
    )
    value: s.EnvValue = Field(description="Value.")

    rules = (
        _name("must begin with " + ", ".join(PREFIXES[:-1]) + f" or {PREFIXES[-1]}, or be a proxy such as HTTPS_PROXY; "
              "other variables can be set in a trainer image of your own",
              f"self.name.matches('{_ALLOWED}')",
              lambda name: re.search(_ALLOWED, name) is not None),
        _name("must not be the name of a credential; put it into a Secret and name that in credentialsRef",
              f"!self.name.upperAscii().matches('{_CREDENTIAL}')",
              lambda name: not is_credential(name)),
        _name("is set by the operator, would change which code is run, or turns a protection off; set it in a trainer "
              "image of your own",
              f"!self.name.matches('{_REFUSED}')",
              lambda name: not re.search(_REFUSED, name)),
        Rule("value", "must be the name of a plugin in the trainer image, not a path",
             "!self.name.endsWith('_PLUGIN') || !self.value.contains('/')",
             lambda m: not m.name.endswith("_PLUGIN") or "/" not in m.value),
        Rule("value", "must not contain a user name or a password; use a proxy that needs none",
             f"!self.name.matches('^({_ANY_PROXY})$') || !self.value.contains('@')",
             lambda m: not re.search(f"^({_ANY_PROXY})$", m.name) or "@" not in m.value),
    )  # fmt: skip


def unique_names(field: str) -> Rule:
    """Returns the rule that a list of variables names each of them once."""
    return Rule(
        field=field,
        message="lists a variable twice; list each once",
        cel=f"self.{field}.all(e, self.{field}.exists_one(other, other.name == e.name))",
        holds=lambda m: len({entry.name for entry in getattr(m, field)}) == len(getattr(m, field)),
    )


def merged(defaults: tuple[EnvVarSpec, ...], own: tuple[EnvVarSpec, ...]) -> tuple[EnvVarSpec, ...]:
    """Returns the variables of both; one that both set has its own value."""
    return tuple({entry.name: entry for entry in (*defaults, *own)}.values())
