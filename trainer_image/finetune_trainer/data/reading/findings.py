"""Counts what of a row isn't trained on although its file has it.

That is a key that nothing reads, or a part that the chat template leaves out. The module is pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_api.messages.data_report import DataWarning, Finding, SplitReport
from finetune_trainer.data.reading import reasoning
from finetune_trainer.data.reading.row import Omission, Row, Turn, Values
from finetune_trainer.data.reading.turns import FURTHER_KEYS, LOSS_KEYS

CHANGED = "changes an answer"
"""What a message about a template that does so contains."""
SUBJECTS = {
    "system": "system prompts", "user": "questions", "assistant": "answers", "tool": "tool results", "text": "texts",
}  # fmt: skip
"""What the turns of each role are called."""
_TURN_KEYS = frozenset(("role", "content", "from", "value", "function_call", *LOSS_KEYS, *FURTHER_KEYS))
_CONVERSATION = frozenset(("system", "tools", "functions", "label", "kto_tag"))
_KEYS = {
    "prompt-completion": frozenset(("prompt", "completion", "system", "label", "kto_tag")),
    "messages": frozenset(("messages", *_CONVERSATION)),
    "text": frozenset(("text",)),
    "alpaca": frozenset(("instruction", "input", "output", "history", "system")),
    "sharegpt": frozenset(("conversations", *_CONVERSATION)),
    "preference": frozenset(("prompt", "chosen", "rejected", *_CONVERSATION)) - {"label", "kto_tag"},
}
_LISTS = {
    "prompt-completion": (("prompt", _TURN_KEYS), ("completion", _TURN_KEYS)),
    "messages": (("messages", _TURN_KEYS),),
    "sharegpt": (("conversations", _TURN_KEYS),),
    "preference": (("prompt", _TURN_KEYS), ("chosen", _TURN_KEYS), ("rejected", _TURN_KEYS)),
}


_FINDINGS = {
    "AnswersNotTrained": "their prompt is too long, or the chat template doesn't separate them from it, so these "
    "aren't trained on:",
    "EmptyAnswers": "these have no text and aren't trained on:",
    "TemplateOmits": "the chat template leaves out",
    "KeysNotRead": "nothing reads",
    "TurnsCut": "dataset.rendering.openTurns is cut, which removed",
    "RenderedTwice": "these look as if they were rendered already, and the chat template renders them again (if so, "
    "set dataset.chatTemplate: none):",
    "ControlTokens": "texts contain control tokens, which look like the border of a turn (dataset.rendering."
    "controlTokens: refuse makes such rows unusable):",
    "Blanks": "the chat template keeps blanks at the beginning or the end of these, so they are trained on "
    "(dataset.rendering.whitespace: strip removes them):",
    "AnswersApart": "the chat template renders these differently once others follow, so each is an example of its own "
    "(dataset.rendering.answers: last trains on the last one only):",
}
_NAMED = 8


class Findings:
    """Collects findings, each with its number and the first row that has it."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], tuple[int, int, str]] = {}

    def add(self, omissions: Sequence[Omission], row: int, file: str = "") -> None:
        """Count what a row loses."""
        for reason, subject, number in omissions:
            count, first_row, first_file = self._counts.get((reason, subject), (0, row, file))
            self._counts[reason, subject] = (count + number, first_row, first_file)

    def listed(self) -> tuple[Finding, ...]:
        """Return the findings in the order in which they occurred first."""
        return tuple(
            Finding(reason=reason, subject=subject, count=count, row=row, file=file)
            for (reason, subject), (count, row, file) in self._counts.items()
        )


def unread(format: str, value: Values) -> list[Omission]:
    """Return the keys of a record, and of its turns, that nothing reads.

    A key without a value counts as absent, as in CSV and parquet. An export of a labeling tool has
    keys of its own, and none of them is returned.
    """
    if format not in _KEYS:
        return []
    known_keys = _KEYS[format]
    names = (
        [] if known_keys.issuperset(value) else [k for k in value if k not in known_keys and not _is_empty(value[k])]
    )
    for name, known in _LISTS.get(format, ()):
        turns = value.get(name)
        if isinstance(turns, list):
            names += sorted({f"{name}[].{key}" for key in _keys_of_turns(turns, known)})
            names = [key for key in names if key not in ("tools", "functions")]
            if value.get("system") and isinstance(turns[0], Mapping) and _begins_with_system(turns[0]):
                names.append("system")
    return [("KeysNotRead", key, 1) for key in sorted(set(names))] if names else []


def omitted(
    row: Row, texts: Sequence[tuple[str, str]], expected: int | None = None, *, apart: int = 0
) -> tuple[Omission, ...]:
    """Return what a chat template leaves out of a row.

    `texts` are (the text before an answer, the answer) for each answer that is trained on, of
    which `apart` are in earlier examples. `expected` is the number of answers that should be
    trained on; None means all.
    """
    rendered = "".join(text for pair in texts for text in pair)
    answers = 0
    omissions: list[Omission] = []
    for turn in row.turns:
        if turn.role == "assistant" and turn.in_loss:
            answers += 1
        if turn.content not in rendered and not _has(rendered, turn.content):
            thought = reasoning.inline(turn.content) if turn.role == "assistant" else ""
            if not thought or not _has(rendered, thought):
                omissions.append(("TemplateOmits", "reasoning" if thought else SUBJECTS[turn.role], 1))
            if thought and not _has(rendered, reasoning.without_block(turn.content)):
                omissions.append(("TemplateOmits", SUBJECTS[turn.role], 1))
        if turn.more:
            more = json.loads(turn.more)
            thoughts = {more[key] for key in reasoning.KEYS if isinstance(more.get(key), str)}
            omissions += [("TemplateOmits", "reasoning", 1) for text in thoughts if not _has(rendered, text)]
            omissions += [("TemplateOmits", "tool calls", 1) for name in _called(more) if name not in rendered]
    if row.tools and not all(name in rendered for name in _names(json.loads(row.tools))):
        omissions.append(("TemplateOmits", "tools", 1))
    missing = (answers if expected is None else expected) - len(texts)
    if missing > 0:
        omissions.append(("AnswersNotTrained", "answers", missing))
    if apart:
        omissions.append(("AnswersApart", "answers", apart))
    return tuple(omissions)


def warnings(split: SplitReport) -> Iterator[DataWarning]:
    """Yield a warning for each kind of what isn't trained on."""
    for reason, description in _FINDINGS.items():
        listed = [
            f"{finding.subject} ({finding.count:,}, first {f'{finding.file} row {finding.row}'.strip()})"
            for finding in split.findings
            if finding.reason == reason
        ]
        if listed:
            more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
            message = f"{split.split}: {description} {', '.join(listed[:_NAMED])}{more}"
            yield DataWarning(reason=reason, message=message)


def changed_answer(turn: Turn, rendered: str) -> str:
    """Return what a template does to an answer, in words that follow "the template"; empty if it
    has the answer as it is.

    `rendered` is the text that would be trained on. Spaces may differ, and a template may move or
    leave out the thoughts at the beginning.
    """
    if turn.more:
        name = missing_call(turn, rendered)
        if not name:
            return ""
        return (
            f"leaves out the call of {name!r} or its arguments, so an answer without it would be trained on; set "
            "dataset.chatTemplate to a template that writes tool_calls"
        )
    answer = turn.content.rpartition("</think>")[2].strip()
    if not rendered or answer in rendered or _has(_squeezed(rendered), _squeezed(answer)):
        return ""
    return f"{CHANGED}: {answer[:80]!r} is trained as {rendered.strip()[:80]!r}; set dataset.chatTemplate"


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def missing_call(turn: Turn, answer: str) -> str:
    """Return the name of a function that `turn` calls and its rendered `answer` doesn't.

    It is empty if all calls are there. The arguments of a call must be there too.
    """
    more = json.loads(turn.more) if turn.more else {}
    if "tool_calls" not in more:
        return ""
    beside_content = answer.replace(turn.content, "", 1) if turn.content else answer
    for call in more["tool_calls"]:
        function = call.get("function", call)
        name, arguments = str(function.get("name", "")), function.get("arguments")
        keys = [str(key) for key in arguments] if isinstance(arguments, Mapping) else []
        if name not in beside_content or (keys and not any(key in beside_content for key in keys)):
            return name
    return ""


def _has(rendered: str, content: str) -> bool:
    """Whether a text contains `content`, as it is or escaped as in JSON."""
    text = content.strip()
    return text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered


def _called(more: Mapping[str, Any]) -> list[str]:
    return _names(more.get("tool_calls", ()))


def _names(functions: Any) -> list[str]:
    inner = (function.get("function", function) for function in functions)
    return [str(function["name"]) for function in inner if isinstance(function, Mapping) and function.get("name")]


def _keys_of_turns(turns: list[Any], known: frozenset[str]) -> Iterator[str]:
    for turn in turns:
        if isinstance(turn, Mapping) and not known.issuperset(turn):
            yield from (key for key in turn if key not in known and not _is_empty(turn[key]))


def _begins_with_system(turn: Mapping[str, Any]) -> bool:
    return turn.get("role", turn.get("from")) in ("system", "developer")


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})
