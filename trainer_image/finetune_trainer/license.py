"""Reads the license of a base model from its README or config.json, and checks it by policies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from finetune_trainer.errors import RunError

UNKNOWN = "unknown"
README = "README.md"
_README_LIMIT = 2**20  # bytes; the front matter is at the start
_FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.S)


def of_folder(model: Path) -> str:
    """Returns the license of the model in a folder, as `of` does."""
    readme, config = model / README, model / "config.json"
    text = readme.read_bytes()[:_README_LIMIT].decode(errors="replace") if readme.is_file() else ""
    try:
        body = json.loads(config.read_bytes()) if config.is_file() else {}
    except ValueError:
        body = {}
    return of(text, body if isinstance(body, dict) else {})


def of(readme: str, config: dict[str, Any]) -> str:
    """Returns a license's identifier in lower case, such as apache-2.0 or llama3.

    It is read from the front matter of the README, otherwise from config.json; UNKNOWN if neither
    names one. With the Hub's `license: other`, `license_name` has the identifier.
    """
    front_matter = _front_matter(readme)
    identifier = _identifier(front_matter.get("license"))
    if identifier in ("", "other"):
        named = _identifier(front_matter.get("license_name"))
        identifier = named or identifier or _identifier(config.get("license"))
    return identifier or UNKNOWN


def check(model_license: str, policies: Iterable[tuple[str, tuple[str, ...]]], at: str) -> None:
    """Raises RunError(LicenceRefused) if a policy doesn't allow the license of the model at `at`.

    A policy is (who sets it, the licenses that it allows); an empty tuple allows all.
    """
    for owner, allowed in policies:
        if allowed and model_license not in {name.lower() for name in allowed}:
            declared = "names no license" if model_license == UNKNOWN else f"has the license {model_license}"
            raise RunError(
                "LicenceRefused",
                f"model.uri: {at} {declared}, and {owner} allows only {', '.join(allowed)}; use another model, or "
                f"have {model_license} added",
            )


def _front_matter(readme: str) -> dict[str, Any]:
    match = _FRONT_MATTER.match(readme.replace("\r\n", "\n"))
    if match is None:
        return {}
    try:
        body = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _identifier(value: Any) -> str:
    """Returns the identifier in a field, or "". All licenses of a list hold: they are joined."""
    if isinstance(value, list):
        return " and ".join(identifier for identifier in map(_identifier, value) if identifier)
    return " ".join(value.lower().split())[:100] if isinstance(value, str) else ""
