"""Defines the rules that several sections of spec share. It does no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_api import scalars as s
from finetune_api.base import Rule


def not_yet(field: str, cel: str, holds: Callable[[Any], bool], feature: str, alternative: str) -> Rule:
    """Returns the rule that rejects an unsupported feature and names an alternative."""
    return Rule(field=field, message=f"{feature} is not supported yet; {alternative}", cel=cel, holds=holds)


def clean_uri() -> Rule:
    """Returns the rule that a URI's path has no segment that would change which folder it names."""
    return Rule(
        field="uri",
        message="must not contain '..', '.' or empty path segments",
        cel="!has(self.uri) || !self.uri.matches('^[a-z0-9]+://.*//|/[.]{1,2}(/|$)')",
        holds=lambda m: m.uri is None or not s.has_parent_segment(m.uri),
    )


def fraction_or_uri() -> Rule:
    """Returns the rule that held-out rows are either a fraction or files of their own."""
    return Rule(
        field="fraction",
        message="exactly one of fraction and uri must be set",
        cel="has(self.fraction) != has(self.uri)",
        holds=lambda m: (m.fraction is None) != (m.uri is None),
    )
