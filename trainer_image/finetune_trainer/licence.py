"""The licence of a base model, as its own README or config.json says, and whether a policy takes it. Pure.

Asked by preflight and the supervisor once the small files are here, and by the model card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from finetune_trainer.failure import Failed

UNKNOWN = "unknown"
README = "README.md"
_LONGEST = 2**20
_FRONT = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.S)


def of_folder(model: Path) -> str:
    """A licence's identifier in lower case, such as apache-2.0 or llama3; `unknown` where nothing says it."""
    readme, config = model / README, model / "config.json"
    text = readme.read_bytes()[:_LONGEST].decode(errors="replace") if readme.is_file() else ""
    try:
        body = json.loads(config.read_bytes()) if config.is_file() else {}
    except ValueError:
        body = {}
    return of(text, body if isinstance(body, dict) else {})


def of(readme: str, config: dict[str, Any]) -> str:
    """`license_name` says which one is meant by the hub's `license: other`."""
    front = _front_matter(readme)
    named = _word(front.get("license"))
    if named in ("", "other"):
        named = _word(front.get("license_name")) or named or _word(config.get("license"))
    return named or UNKNOWN


def check(found: str, allowed: Iterable[tuple[str, tuple[str, ...]]], at: str) -> None:
    """`allowed`: (who asks for it, the licences that they take; none is all). Raises Failed(LicenceRefused)."""
    for who, licences in allowed:
        if licences and found not in {licence.lower() for licence in licences}:
            says = "says nothing of its licence" if found == UNKNOWN else f"has the licence {found}"
            raise Failed(
                "LicenceRefused",
                f"model.uri: {at} {says}, and {who} takes only {', '.join(licences)}; take another model, or have "
                f"{found} added",
            )


def _front_matter(readme: str) -> dict[str, Any]:
    match = _FRONT.match(readme.replace("\r\n", "\n"))
    if match is None:
        return {}
    try:
        body = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _word(value: Any) -> str:
    """A list of licences counts as what it is: all of them hold."""
    if isinstance(value, list):
        return " and ".join(word for word in map(_word, value) if word)
    return " ".join(value.lower().split())[:100] if isinstance(value, str) else ""
