"""Defines the base of every model in the contract.

Models are strict and frozen, have camelCase names in JSON, and can have rules that both pydantic
and the API server enforce.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import InitErrorDetails, PydanticCustomError


@dataclass(frozen=True)
class Rule:
    """States one constraint of a model in two languages.

    pydantic evaluates `holds` and the API server evaluates `cel` (`x-kubernetes-validations`);
    tests/api runs one table of specs through both. `field` is the path of the field that the
    message is about: dotted, in camelCase and relative to the model.
    """

    field: str
    message: str
    cel: str
    holds: Callable[[Any], bool]


class Model(BaseModel):
    """Bases all models of the contract: strict, frozen, and with camelCase names in JSON."""

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
        """Returns a plain JSON value with camelCase keys and without absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _line_error(rule: Rule, model: Model) -> InitErrorDetails:
    """Turns a broken rule into an error of its field, as the API server reports it."""
    return InitErrorDetails(
        type=PydanticCustomError("rule", "{message}", {"message": rule.message}),
        loc=tuple(rule.field.split(".")),
        input=model,
    )


def model_in(annotation: Any) -> type[Model] | None:
    """Returns the model inside an annotation (Optional, tuple, Annotated), or None."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return annotation
    return next((model for part in get_args(annotation) if (model := model_in(part))), None)


def as_admitted(body: Any, model: type[Model] | None) -> Any:
    """Returns a value as the API server reads it: nulls are absent, and 2.0 is the integer 2.

    `model` describes the value; None if it isn't an object with known fields.
    """
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
    """Bases the models that ignore unknown keys, since another version may have written them."""

    model_config = ConfigDict(extra="ignore", strict=False)
