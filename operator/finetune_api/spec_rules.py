"""Rules that several parts of spec share. Pure."""

from __future__ import annotations

from typing import Any

from finetune_api import scalars as s
from finetune_api.model import Rule


def not_yet(field: str, cel: str, holds: Any, what: str, instead: str) -> Rule:
    return Rule(field=field, message=f"{what} is not supported yet; {instead}", cel=cel, holds=holds)


def clean_uri() -> Rule:
    return Rule(
        field="uri",
        message="must not hold '..', '.' or empty path segments",
        cel="!has(self.uri) || !self.uri.matches('^[a-z0-9]+://.*//|/[.]{1,2}(/|$)')",
        holds=lambda m: m.uri is None or not s.has_parent_segment(m.uri),
    )


def reachable() -> Rule:
    return not_yet(
        "uri",
        "!has(self.uri) || !self.uri.matches('^(gs|az)://')",
        lambda m: m.uri is None or not m.uri.startswith(("gs://", "az://")),
        "gs:// and az://",
        "use s3://, hf:// or pvc://",
    )


def fraction_or_uri() -> Rule:
    """Of held-out rows: a share of the training rows, or a place of their own."""
    return Rule(
        field="fraction",
        message="give either fraction or uri, exactly one",
        cel="has(self.fraction) != has(self.uri)",
        holds=lambda m: (m.fraction is None) != (m.uri is None),
    )
