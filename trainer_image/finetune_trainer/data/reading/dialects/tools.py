"""Reads the list of functions that a row offers, and writes each as chat templates get it from an
API: {"type": "function", "function": {"name": …, "parameters": …}}. The module is pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune_trainer.data.reading.containers import json_text
from finetune_trainer.data.reading.row import printable, short_repr

_DECLARATIONS = ("functionDeclarations", "function_declarations")
_SCHEMAS = ("input_schema", "inputSchema", "parametersJsonSchema")


def functions(value: Any) -> list[Any]:
    """Return the functions in a list, or in its JSON text; none for a value that is empty.

    Those of Anthropic, Bedrock and Gemini, and those without a type, are written as an API has
    them. Raises ValueError for anything that isn't a list of functions.
    """
    tools = _parsed(value)
    if not tools:
        return []
    tools = [tools] if isinstance(tools, Mapping) else tools
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools is {short_repr(value)}; it must be a list of functions")
    return [written for index, tool in enumerate(tools) for written in _written(tool, f"tools[{index}]")]


def _parsed(value: Any) -> Any:
    return json_text.decoded(value, "tools", "a list of functions") if value else value


def _written(tool: Mapping[str, Any], path: str) -> Iterator[Mapping[str, Any]]:
    declared = next((tool[key] for key in _DECLARATIONS if isinstance(tool.get(key), list)), None)
    if declared is not None:
        for function in declared:
            yield from _written(function, path) if isinstance(function, Mapping) else ()
        return
    if isinstance(tool.get("toolSpec"), Mapping):
        tool = tool["toolSpec"]
    if tool.get("type") not in (None, "function") or isinstance(tool.get("function"), Mapping):
        yield tool
        return
    if not isinstance(tool.get("name"), str):
        keys = ", ".join(map(printable, tool)) or "nothing"
        raise ValueError(f"{path} has no name of a function (it has {keys}); write it in name")
    function = {key: inner for key, inner in tool.items() if key not in ("type", *_SCHEMAS)}
    schema = next((tool[key] for key in _SCHEMAS if key in tool), None)
    if schema is not None and "parameters" not in function:
        function["parameters"] = schema["json"] if isinstance(schema, Mapping) and "json" in schema else schema
    yield {"type": "function", "function": function}
