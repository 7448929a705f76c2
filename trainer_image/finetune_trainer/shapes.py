"""A record (a JSON object) → one example as turns, by the format that its keys have. Pure; called by `rows`.

Formats are what practitioners' files already are: prompt and completion, messages, text, Alpaca, ShareGPT; exports of
labelling tools are in `exports`. A ValueError says what is wrong, by key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune_trainer import pairs

ROLES = ("system", "user", "assistant", "tool")
_SPOKEN = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "model": "assistant", "function_call": "assistant", "system": "system",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_FURTHER = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Turn:
    """`learnt` says whether an assistant's turn counts in the loss; `more` is JSON of further keys (tool_calls, …)
    that a chat template may ask for."""

    role: str
    content: str
    learnt: bool = True
    more: str = ""


@dataclass(frozen=True)
class Row:
    """One example. `number` is the record's, see `containers`; `file` its file's place in the split."""

    number: int
    turns: tuple[Turn, ...]  # prompt-completion is ("user", prompt), ("assistant", completion)
    plain: bool = False  # may be rendered without a chat template
    file: int = 0
    tools: str = ""  # JSON of a list of functions, for the chat template
    rejected: tuple[Turn, ...] = ()  # preference: the turns with the other answer
    bare: str = ""  # what stands for the prompt where there is no chat template; empty: the prompt itself

    @property
    def is_text(self) -> bool:
        """All of it is learnt; there is no prompt."""
        return self.turns[0].role == "text"


Values = Mapping[str, Any]
Shape = Callable[[int, Values], Row]


def prompt_completion(number: int, value: Values) -> Row:
    """Two strings, or two lists of turns, of which the completion's are learnt."""
    for key in ("prompt", "completion"):
        if key not in value:
            raise ValueError(f"{key} is missing")
    if isinstance(value["prompt"], list) and isinstance(value["completion"], list):
        before = tuple(replace(turn, learnt=False) for turn in turns(value["prompt"], "prompt"))
        after = turns(value["completion"], "completion")
        return _conversation(number, (*before, *after), value, "completion")
    prompt, completion = text(value, "prompt"), text(value, "completion")
    if not completion.strip():
        raise ValueError("completion is empty")
    system = _system(value)
    return Row(number, (*system, Turn("user", prompt), Turn("assistant", completion)), plain=not system)


def messages(number: int, value: Values) -> Row:
    if "messages" not in value:
        raise ValueError("messages is missing")
    return _conversation(number, turns(value["messages"], "messages"), value, "messages")


def plain_text(number: int, value: Values) -> Row:
    """A document: every token of it is learnt."""
    whole = text(value, "text")
    if not whole.strip():
        raise ValueError("text is empty")
    return Row(number, (Turn("text", whole),), plain=True)


def alpaca(number: int, value: Values) -> Row:
    """Stanford's keys; with a chat template the instruction and its input are the user's turn, without one they stand
    in Stanford's own frame."""
    instruction, output = text(value, "instruction"), text(value, "output")
    given = text(value, "input") if value.get("input") is not None else ""
    if not output.strip():
        raise ValueError("output is empty")
    if not instruction.strip() and not given.strip():
        raise ValueError("instruction and input are empty")
    history = _history(value.get("history") or [])
    system = _system(value)
    asked = "\n\n".join(part for part in (instruction, given) if part.strip())
    frame = ALPACA_INPUT if given.strip() else ALPACA
    return Row(
        number,
        (*system, *history, Turn("user", asked), Turn("assistant", output)),
        plain=not system and not history,
        bare=frame.format(instruction=instruction, input=given),
    )


def sharegpt(number: int, value: Values) -> Row:
    if "conversations" not in value:
        raise ValueError("conversations is missing")
    listed = value["conversations"]
    if not isinstance(listed, list) or not listed:
        raise ValueError("conversations isn't a list with at least one turn")
    said = []
    for index, turn in enumerate(listed):
        where = f"conversations[{index}]"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{where} isn't an object with from and value")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in _SPOKEN:
            raise ValueError(f"{where}.from is {shown(role)}; it must be one of {', '.join(_SPOKEN)}")
        key = "value" if "value" in turn or "content" not in turn else "content"
        said.append(Turn(_SPOKEN[role], text(turn, key, f"{where}.")))
    return _conversation(number, tuple(said), value, "conversations")


SHAPES: dict[str, Shape] = {
    "prompt-completion": prompt_completion,
    "messages": messages,
    "text": plain_text,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    pairs.FORMAT: lambda number, value: pairs.row(number, value, prompt_completion, messages),
}


def turns(listed: Any, where: str) -> tuple[Turn, ...]:
    """A list of objects with role and content, as chat APIs have them."""
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{where} isn't a list with at least one turn")
    return tuple(_turn(f"{where}[{index}]", turn) for index, turn in enumerate(listed))


def text(value: Values, key: str, where: str = "") -> str:
    """A string that can be written as UTF-8."""
    if key not in value:
        raise ValueError(f"{where}{key} is missing")
    found = value[key]
    if not isinstance(found, str):
        raise ValueError(f"{where}{key} isn't a string")
    try:
        found.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}{key} holds half a character (a lone surrogate)") from None
    return found


def shown(value: Any) -> str:
    """A value as a message has it, short."""
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}…"


def _conversation(number: int, said: tuple[Turn, ...], value: Values, where: str) -> Row:
    if said[0].role != "system":
        said = (*_system(value), *said)
    last = said[-1]
    if last.role != "assistant":
        raise ValueError(f"the last turn's role is {last.role!r}; it must be 'assistant', which is learnt")
    if said[0].role == "assistant":
        raise ValueError("the first turn's role is 'assistant'; there is nothing to answer")
    if not last.content.strip() and not last.more:
        raise ValueError("the last turn's content is empty")
    if any(turn.role == "system" for turn in said[1:]):
        raise ValueError("role 'system' must be the first turn")
    if not any(turn.learnt for turn in said if turn.role == "assistant"):
        raise ValueError(f"{where}: every assistant turn has weight 0, so nothing is learnt")
    return Row(number, said, tools=_tools(value.get("tools")))


def _turn(where: str, turn: Any) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} isn't an object with role and content")
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where}.role is {shown(role)}; it must be one of {', '.join(ROLES)}")
    weight = turn.get("weight", 1)
    if weight not in (0, 1):
        raise ValueError(f"{where}.weight is {shown(weight)}; it must be 0 (not learnt) or 1")
    further = {key: turn[key] for key in _FURTHER if turn.get(key)}
    if "tool_calls" in further:
        further["tool_calls"] = _calls(further["tool_calls"], f"{where}.tool_calls")
    content = turn.get("content")
    if content is None and "tool_calls" in further:
        content = ""
    elif isinstance(content, list):
        content = "".join(_part(f"{where}.content[{index}]", part) for index, part in enumerate(content))
    else:
        content = text(turn, "content", f"{where}.")
    return Turn(role, content, learnt=bool(weight), more=_canonical(further, where) if further else "")


def _calls(listed: Any, where: str) -> list[Any]:
    """Chat templates write arguments as JSON themselves; APIs hand them over as JSON text."""
    if not isinstance(listed, list) or not all(isinstance(call, Mapping) for call in listed):
        raise ValueError(f"{where} isn't a list of calls")
    return [_call(call) for call in listed]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _call(inner)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return dict(call)
        if isinstance(parsed, Mapping):
            return {**call, "arguments": parsed}
    return dict(call)


def _part(where: str, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise ValueError(f"{where} is of type {shown(kind)}; only text is learnt from")
    return text(part, "text", f"{where}.")


def _tools(value: Any) -> str:
    """A list of functions, or such a list as JSON text (parquet files often have it so)."""
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("tools isn't JSON") from None
        if not value:
            return ""
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise ValueError("tools isn't a list of functions")
    return _canonical(value, "tools")


def _canonical(value: Any, where: str) -> str:
    try:
        said = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        said.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half a character (a lone surrogate)") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} can't be written as JSON ({error})") from None
    return said


def _system(value: Values) -> tuple[Turn, ...]:
    if value.get("system") in (None, ""):
        return ()
    return (Turn("system", text(value, "system")),)


def _history(listed: Any) -> tuple[Turn, ...]:
    if not isinstance(listed, list):
        raise ValueError("history isn't a list of [instruction, output] pairs")
    said: list[Turn] = []
    for index, pair in enumerate(listed):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history[{index}] isn't a pair of instruction and output")
        named = {"[0]": pair[0], "[1]": pair[1]}
        said += [
            Turn("user", text(named, "[0]", f"history[{index}]")),
            Turn("assistant", text(named, "[1]", f"history[{index}]")),
        ]
    return tuple(said)
