"""The base of every model in the contract: strict, frozen, camelCase outside, and able to carry rules that
hold in pydantic and in the API server alike. Never does I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import InitErrorDetails, PydanticCustomError


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
            raise ValidationError.from_exception_data(type(self).__name__, [_line_error(rule, self) for rule in broken])
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value with camelCase keys, without absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _line_error(rule: Rule, model: Model) -> InitErrorDetails:
    """A broken rule as an error at the field that it is about, as the API server reports it."""
    return InitErrorDetails(
        type=PydanticCustomError("rule", "{message}", {"message": rule.message}),
        loc=tuple(rule.field.split(".")),
        input=model,
    )


def model_in(annotation: Any) -> type[Model] | None:
    """The model that an annotation holds, through Optional, tuple and Annotated; None where it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return annotation
    return next((found for part in get_args(annotation) if (found := model_in(part))), None)


def as_admitted(body: Any, model: type[Model] | None) -> Any:
    """A raw value as the API server sees it: a null under a key counts as absent, and 2.0 is the integer 2."""
    if isinstance(body, float) and body.is_integer() and abs(body) < 2**63:
        return int(body)
    if isinstance(body, list | tuple):
        return [as_admitted(item, model) for item in body]
    if not isinstance(body, Mapping):
        return body
    fields = model.model_fields if model else {}
    types = {field.alias or name: field.annotation for name, field in fields.items()}
    return {key: as_admitted(value, model_in(types.get(key))) for key, value in body.items() if value is not None}


class LenientModel(Model):
    """For what another version of us wrote (progress, results, status): unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=False)
