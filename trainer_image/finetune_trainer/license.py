"""Reads the license of a base model from its README or config.json, and checks it by policies."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from finetune_trainer import model_config
from finetune_trainer.errors import RunError

UNKNOWN = "unknown"
README = "README.md"
_NAME = re.compile(r"[a-z0-9][a-z0-9.+_ -]{0,63}")
_MAX_LISTED = 8
_FIELD = re.compile(
    r"^license(?:_name)?[ \t]*:.*\n(?:(?:[ \t-].*)?\n){0,100}", re.M
)  # one key, with the lines that belong to it
_FIELD_LIMIT = 4096  # characters
_README_LIMIT = 2**20  # bytes; the front matter is at the start
_DELIMITER = "---"
_MAX_FIELDS = 8  # that are parsed; a README has two
_MAX_DEPTH = 4


def of_folder(model: Path) -> str:
    """Returns the license of the model in a folder, as `of` does."""
    readme, config = model / README, model / "config.json"
    text = ""
    if readme.is_file():
        with readme.open("rb") as file:
            text = file.read(_README_LIMIT).decode(errors="replace")
    try:
        body = model_config.read(config.name, config.read_bytes(), "the folder") if config.is_file() else {}
    except RunError:
        body = {}
    return of(text, body)


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
    first, *lines = readme.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    end = next((number for number, line in enumerate(lines) if line.rstrip() == _DELIMITER), None)
    if first.rstrip() != _DELIMITER or end is None:
        return {}
    front_matter: dict[str, Any] = {}
    for field in islice(_FIELD.finditer("\n".join(lines[:end]) + "\n"), _MAX_FIELDS):
        try:
            body = yaml.load(field.group(0)[:_FIELD_LIMIT], _WithoutAliases)  # noqa: S506 (a SafeLoader)
        except (yaml.YAMLError, ValueError, RecursionError):
            continue
        front_matter |= body if isinstance(body, dict) else {}
    return front_matter


class _WithoutAliases(yaml.SafeLoader):
    """Refuses aliases, by which a few bytes stand for any number of values, and deep nesting."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Returns the next node. Raises YAMLError for an alias, and below too many others."""
        if self.check_event(yaml.AliasEvent) or self._depth > _MAX_DEPTH:
            raise yaml.YAMLError("an alias, or too many levels")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _identifier(value: Any) -> str:
    """Returns the identifier in a field, or "". All licenses of a list hold: they are joined.

    Whatever isn't a plain name is UNKNOWN: the identifier is shown in the model card and in status.
    """
    if isinstance(value, list):
        names = [_identifier(name) for name in value[:_MAX_LISTED] if isinstance(name, str)]
        return " and ".join(name for name in names if name)
    if not isinstance(value, str):
        return ""
    name = " ".join(value.lower().split())
    return name if not name or _NAME.fullmatch(name) else UNKNOWN
