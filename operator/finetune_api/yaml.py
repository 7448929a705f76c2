"""Parses YAML as kubectl does: `2e-4` is a number, `yes` is true, a date is a string.

kubectl uses sigs.k8s.io/yaml (YAML 1.1 with Go's numbers, then JSON); PyYAML parses numbers
differently. tests/api compares this module with kubectl. It reads text, never files.
"""

from __future__ import annotations

import base64
import math
import re
from typing import Any

import yaml

_PLAIN = "tag:finetune-operator.io,2026:plain"
_MERGE = "tag:yaml.org,2002:merge"

_LITERALS: dict[str, Any] = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
}
_NOT_JSON = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INTEGER = re.compile(r"([-+]?)(0[xX][0-9a-fA-F]+|0[oO]?[0-7]+|0[bB][01]+|0|[1-9][0-9]*)")
_INT64 = range(-(2**63), 2**63)


class _Loader(yaml.SafeLoader):
    """Extends PyYAML's loader with kubectl's rules for unquoted scalars and for keys."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: Any) -> str:
        """Returns the tag of a node; unquoted scalars get one of our own."""
        if kind is yaml.ScalarNode and implicit[0]:
            return _MERGE if value == "<<" else _PLAIN
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]

    def construct_plain(self, node: yaml.ScalarNode) -> Any:
        """Returns the value of an unquoted scalar. Raises ConstructorError if JSON lacks it."""
        try:
            return plain(node.value)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error

    def construct_binary(self, node: yaml.ScalarNode) -> str:
        """Returns the text that a base64 scalar (`!!binary`) encodes."""
        return base64.b64decode(node.value).decode("utf-8", "replace")

    def construct_merge(self, node: yaml.ScalarNode) -> str:
        """Returns `<<` as text if it isn't a key."""
        return str(node.value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns a mapping with string keys. Raises ConstructorError if a key is set twice."""
        keys = [(self._key(key), key) for key, _ in node.value if key.tag != _MERGE]
        for index, (name, key) in enumerate(keys):
            if name in {earlier for earlier, _ in keys[:index]}:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} is set twice; remove one", key.start_mark
                )
        self.flatten_mapping(node)
        return {self._key(key): self.construct_object(value, deep) for key, value in node.value}

    def _key(self, node: yaml.Node) -> str:
        """Returns a key as a string, since JSON has no other keys."""
        key = self.construct_object(node, True)
        if isinstance(key, bool):
            return "true" if key else "false"
        if key is None or isinstance(key, list | dict):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a string or a number", node.start_mark)
        return str(key)


_Loader.add_constructor(_PLAIN, _Loader.construct_plain)
_Loader.add_constructor(_MERGE, _Loader.construct_merge)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_plain)
_Loader.add_constructor("tag:yaml.org,2002:binary", _Loader.construct_binary)


def load_all(text: str) -> tuple[Any, ...]:
    """Returns every document that isn't empty. Raises yaml.YAMLError with line and column.

    It is stricter than kubectl in one respect: a duplicate key in a mapping is an error.
    """
    documents = yaml.load_all(text, Loader=_Loader)
    return tuple(document for document in documents if document is not None)


def load(text: str) -> Any:
    """Returns the only document in a text. Raises ValueError if there is none, or more than one."""
    documents = load_all(text)
    if len(documents) != 1:
        raise ValueError(f"this YAML contains {len(documents)} documents; exactly one is expected")
    return documents[0]


def plain(text: str) -> Any:
    """Returns the value of an unquoted scalar.

    Raises ValueError for .nan and .inf, which JSON lacks.
    """
    if text in _LITERALS:
        return _LITERALS[text]
    if _NOT_JSON.fullmatch(text):
        raise ValueError(f"{text} is not a number that Kubernetes can store; use a finite one")
    if text[0] not in "+-.0123456789":
        return text
    number = text.replace("_", "")
    if match := _INTEGER.fullmatch(number):
        value = _integer(match.group(2)) * (-1 if match.group(1) == "-" else 1)
        if value in _INT64:
            return value
    if _FLOAT.fullmatch(number):
        return _float(float(number), text)
    return text


def _integer(digits: str) -> int:
    """Parses an integer with Go's base prefixes: 0x, 0o or a bare 0 for octal, 0b."""
    prefix = digits[:2].lower()
    if prefix in ("0x", "0o", "0b"):
        return int(digits[2:], {"0x": 16, "0o": 8, "0b": 2}[prefix])
    return int(digits, 8 if len(digits) > 1 and digits[0] == "0" else 10)


def _float(value: float, text: str) -> int | float:
    """Returns an integer for a whole number, since JSON as Go writes it has 2 instead of 2.0."""
    if math.isinf(value):
        raise ValueError(f"the number {text} is too large")
    return int(value) if value.is_integer() and int(value) in _INT64 else value
