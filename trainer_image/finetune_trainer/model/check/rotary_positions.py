"""Knows the rotary positions whose frequencies depend on more than the example itself.

Some models use other frequencies as soon as a position exceeds a limit. Transformers decides this
by the longest position of a batch, so a long example changes how the others in its batch are
computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_BY_LONGEST_POSITION = ("longrope", "dynamic")
"""The kinds of rotary positions that do so, as Transformers names them."""


def by_longest_position(config: Any) -> tuple[str, ...]:
    """Returns the kinds of a text configuration's rotary positions that follow the longest one."""
    return tuple(sorted({kind for kind, _ in _sections(config)} & set(_BY_LONGEST_POSITION)))


def company_obstacle(config: Any, longest: int) -> str:
    """Returns why examples must be computed one by one if the longest has `longest` tokens; empty
    if they needn't.

    `config` is a text configuration. In "longrope" (Ding et al. 2024), the limit is
    original_max_position_embeddings; in "dynamic", it is max_position_embeddings.
    """
    for kind, section in _sections(config):
        if kind not in _BY_LONGEST_POSITION:
            continue
        limit = getattr(config, "max_position_embeddings", None)
        if kind == "longrope":
            limit = section.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", limit
            )
        if isinstance(limit, int) and longest > limit:
            return (
                f"an example of more than {limit} tokens changes the rotary positions ({kind}) of all examples that "
                "are computed with it"
            )
    return ""


def _sections(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Returns (kind, parameters) for all kinds of layers."""
    for name in ("rope_parameters", "rope_scaling"):
        section = getattr(config, name, None)
        for part in (section, *section.values()) if isinstance(section, dict) else ():
            if isinstance(part, dict):
                yield str(part.get("rope_type") or part.get("type") or "default"), part
