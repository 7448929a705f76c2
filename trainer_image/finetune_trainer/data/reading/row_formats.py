"""Turns a record (a JSON object) into one row, by the format that its keys reveal.

The formats are widely used ones: prompt and completion, messages, text, Alpaca, ShareGPT. The
exports of labeling tools are in `labeling_tools`. A ValueError names the key and what is wrong
with it. The module is pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from finetune_trainer.data.reading import content_parts, preference_rows
from finetune_trainer.data.reading.dialects import tools
from finetune_trainer.data.reading.row import Row, Turn, Values, is_blank, missing, short_repr, text
from finetune_trainer.data.reading.turns import canonical, parsed_list, turns

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

_MARKED = frozenset(("label", "kto_tag", "status"))
_MEDIA = frozenset(("image", "images", "audio", "audios", "video", "videos"))
_MARK = re.compile(
    r"<\|?(?:image|img|audio|video|vision|speech|sound)(?:[_-]?(?:\d+|pad|start|token|placeholder))?\|?>|\[IMG\]"
)

_DISCARDED = ("discarded", "Discarded", "rejected", "Rejected")  # of Argilla

RowFormat = Callable[[int, Values], Row]


def prompt_completion(number: int, value: Values) -> Row:
    """Read two strings, or two lists of turns, of which only the completion counts in the loss."""
    for key in ("prompt", "completion"):
        if value.get(key) is None:
            raise ValueError(missing(value, key))
    value = _with_turns(value)
    if isinstance(value["prompt"], list) and isinstance(value["completion"], list):
        before = tuple(replace(turn, in_loss=False) for turn in _turns(value, "prompt"))
        after = _turns(value, "completion")
        return _conversation(number, (*before, *after), value)
    _refuse_undesired(value)
    prompt, completion = text(value, "prompt"), text(value, "completion")
    _refuse_media(value, (prompt, completion))
    if is_blank(completion):
        raise ValueError("completion is empty")
    system = _system(value)
    return Row(number, (*system, Turn("user", prompt), Turn("assistant", completion)), plain=not system)


def _with_turns(value: Values) -> Values:
    """Return a record whose prompt and completion are turns if one of them is."""
    prompt, completion = parsed_list(value["prompt"]), value["completion"]
    if isinstance(completion, Mapping) and "content" in completion:
        completion = [{"role": "assistant", **completion}]
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(completion, list) and completion and isinstance(completion[0], Mapping) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return {**value, "prompt": prompt, "completion": completion} if isinstance(prompt, list) else value


def messages(number: int, value: Values) -> Row:
    """Read a conversation as chat APIs have it: a list of turns with role and content."""
    if value.get("messages") is None:
        raise ValueError(missing(value, "messages"))
    return _conversation(number, _turns(value, "messages"), value)


def plain_text(number: int, value: Values) -> Row:
    """Read a document, of which every token counts in the loss."""
    content = text(value, "text")
    if is_blank(content):
        raise ValueError("text is empty")
    return Row(number, (Turn("text", content),), plain=True)


def alpaca(number: int, value: Values) -> Row:
    """Read the keys of Stanford Alpaca.

    With a chat template the instruction and its input become the user's turn; without one they are
    put into Stanford's own prompt.
    """
    instruction, output = text(value, "instruction"), text(value, "output")
    context = text(value, "input") if value.get("input") is not None else ""
    if is_blank(output):
        raise ValueError("output is empty")
    if is_blank(instruction) and is_blank(context):
        raise ValueError("instruction and input are empty")
    _refuse_media(value, (instruction, context, output))
    history = _history(value.get("history") or [])
    system = _system(value)
    question = "\n\n".join(part for part in (instruction, context) if part.strip())
    template = ALPACA_INPUT if context.strip() else ALPACA
    return Row(
        number,
        (*system, *history, Turn("user", question), Turn("assistant", output)),
        plain=not system and not history,
        plain_prompt=template.format(instruction=instruction, input=context),
    )


def sharegpt(number: int, value: Values) -> Row:
    """Read a conversation in ShareGPT's format: a list of turns with from and value."""
    if value.get("conversations") is None:
        raise ValueError(missing(value, "conversations"))
    return _conversation(number, _turns(value, "conversations"), value)


FORMATS: dict[str, RowFormat] = {
    "prompt-completion": prompt_completion,
    "messages": messages,
    "text": plain_text,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    preference_rows.FORMAT: lambda number, value: preference_rows.row(number, value, prompt_completion, messages),
}


def _conversation(number: int, turns: tuple[Turn, ...], value: Values) -> Row:
    _refuse_undesired(value)
    _refuse_media(value, (turn.content for turn in turns))
    if turns[0].role != "system":
        turns = (*_system(value), *turns)
    return Row(number, turns, tools=_tools(value))


def _turns(value: Values, key: str) -> tuple[Turn, ...]:
    return turns(value[key], key, has_tools=bool(value.get("tools")))


def _refuse_undesired(value: Values) -> None:
    """Refuse an answer that must not be learned. Raises ValueError."""
    if _MARKED.isdisjoint(value):
        return
    if value.get("status") in _DISCARDED:
        raise ValueError(f"status is {short_repr(value['status'])}, which marks the row as undesired; remove it")
    key = next((key for key in ("label", "kto_tag") if value.get(key) is not None), None)
    label = value[key] if key else True
    if label in (False, "false", "False", "FALSE", "undesirable", "bad", "rejected"):
        raise ValueError(
            f"{key} is {short_repr(label)}, which marks the answer as undesired (a row for KTO, which isn't supported);"
            " remove the row, or rename the key if it means something else"
        )


def _refuse_media(value: Values, texts: Iterable[str]) -> None:
    """Refuse a question about an image or a sound that only its marker stands for. Raises
    ValueError."""
    if _MEDIA.isdisjoint(value):
        return
    key = next((key for key in sorted(_MEDIA) if value.get(key)), None)
    mark = next((mark.group() for content in texts if (mark := _MARK.search(content))), None) if key else None
    if mark:
        raise ValueError(f"its texts contain {mark} and it has {key}; only text can be trained on: remove the row")


def _tools(value: Values) -> str:
    """Return the list of functions of a row as JSON; empty if it has none."""
    functions = tools.functions(value.get("tools"))
    if functions:
        return canonical(functions, "tools")
    older = [function.get("function", function) for function in tools.functions(value.get("functions"))]
    return canonical([{"type": "function", "function": function} for function in older], "functions") if older else ""


def _system(value: Values) -> tuple[Turn, ...]:
    if value.get("system") in (None, ""):
        return ()
    content, _ = content_parts.text_and_reasoning(value["system"], "system", "system")
    return (Turn("system", text({**value, "system": content}, "system")),)


def _history(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise ValueError("history isn't a list of [instruction, output] pairs")
    earlier: list[Turn] = []
    for index, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history[{index}] isn't a pair of instruction and output")
        by_name = {"[0]": pair[0], "[1]": pair[1]}
        earlier += [
            Turn("user", text(by_name, "[0]", f"history[{index}]")),
            Turn("assistant", text(by_name, "[1]", f"history[{index}]")),
        ]
    return tuple(earlier)
