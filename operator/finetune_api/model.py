"""The base of every model in the contract: strict, frozen, camelCase outside, and able to carry rules that
hold in pydantic and in the API server alike. Never does I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """One sentence about a model, in two languages.

    `holds` is asked by pydantic, `cel` by the API server (`x-kubernetes-validations`); tests/api runs one
    table of specs through both. `field` is the path (relative, dotted, camelCase) that the message is about.
    """

    field: str
    message: str
    cel: str
    holds: Callable[[Any], bool]


class Model(BaseModel):
    """Strict and frozen; camelCase in JSON, snake_case in Python."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_enum_values=False,
        validate_default=False,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _rules_hold(self) -> Model:
        broken = [rule for rule in self.rules if not rule.holds(self)]
        if broken:
            raise ValueError("; ".join(f"{rule.field}: {rule.message}" for rule in broken))
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value with camelCase keys, without absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class LenientModel(Model):
    """For what another version of us wrote (progress, results, status): unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=False)
