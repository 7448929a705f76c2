"""Counts what of a row isn't trained on although its file has it.

That is a key that nothing reads, or a part that the chat template leaves out. The module is pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_api.messages.data_report import DataWarning, Finding, SplitReport
from finetune_trainer.data.reading import reasoning
from finetune_trainer.data.reading.dialects import calls
from finetune_trainer.data.reading.row import Omission, Row, Turn, Values, printable
from finetune_trainer.data.reading.turns import FURTHER_KEYS, LOSS_KEYS, parsed_list

CHANGED = "changes an answer"
"""What a message about a template that does so contains."""
SUBJECTS = {
    "system": "system prompts", "user": "questions", "assistant": "answers", "tool": "tool results", "text": "texts",
}  # fmt: skip
"""What the turns of each role are called."""
_TURN_KEYS = frozenset(("role", "content", "from", "value", "parts", "function_call", *LOSS_KEYS, *FURTHER_KEYS))
_ITEM_KEYS = frozenset(("type", "call_id", "id", "arguments", "output", "status"))
"""Keys of the items of the Responses API, which have no role."""
_USUAL = ("user", "assistant", "human", "gpt", "system", "tool", None)
_CONVERSATION = frozenset(("system", "tools", "functions"))
_DESIRED = ("label", "kto_tag")
"""Keys that may say that the answer is a desired one, as in rows for KTO."""
_KEYS = {
    "prompt-completion": frozenset(("prompt", "completion", *_CONVERSATION)),
    "messages": frozenset(("messages", *_CONVERSATION)),
    "text": frozenset(("text",)),
    "alpaca": frozenset(("instruction", "input", "output", "history", "system")),
    "sharegpt": frozenset(("conversations", *_CONVERSATION)),
    "preference": frozenset(("prompt", "chosen", "rejected", *_CONVERSATION)),
}
_ALWAYS_TURNS = ("messages", "conversations")  # a prompt or a completion may be JSON that is meant as a text
_LISTS = {
    "prompt-completion": (("prompt", _TURN_KEYS), ("completion", _TURN_KEYS)),
    "messages": (("messages", _TURN_KEYS),),
    "sharegpt": (("conversations", _TURN_KEYS),),
    "preference": (("prompt", _TURN_KEYS), ("chosen", _TURN_KEYS), ("rejected", _TURN_KEYS)),
}


_FINDINGS = {
    "AnswersNotTrained": "their prompt is too long, or the chat template doesn't separate them from it, so these "
    "aren't trained on:",
    "AnswersShared": "chosen and rejected have these in common, so they are part of the prompt and aren't trained on:",
    "EmptyQuestions": "these have no text, so their answers are trained on without a question:",
    "EmptyAnswers": "these have no text and aren't trained on:",
    "OpenReasoning": "the reasoning of these never ends, perhaps because they were cut off, and it is trained on:",
    "ReasoningOnly": "these have reasoning and no text after it, so a model learns to answer with nothing:",
    "BrokenText": "these contain U+FFFD, which stands for characters that were lost when a text was decoded:",
    "TemplateOmits": "the chat template leaves out",
    "CallsAsText": "these have a role or tags of calls, and are trained on as texts, because they aren't the JSON of "
    "calls with a name and arguments, or the chat template writes no calls:",
    "TagsTwice": "the chat template writes the tags around these itself, so they are there twice (remove them from the "
    "rows):",
    "KeysNotRead": "nothing reads",
    "TurnsCut": "dataset.rendering.openTurns is cut, which removed",
    "RenderedTwice": "these look as if they were rendered already, and the chat template renders them again (if so, "
    "set dataset.chatTemplate: none):",
    "ControlTokens": "texts contain control tokens, which look like the border of a turn (dataset.rendering."
    "controlTokens: encode makes them plain text, refuse makes such rows unusable):",
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
    omissions: list[Omission] = []
    names = (
        [] if known_keys.issuperset(value) else [k for k in value if k not in known_keys and not _is_empty(value[k])]
    )
    if names and format != "preference":
        names = [key for key in names if key not in _DESIRED or not is_desired(value[key])]
    for name, known in _LISTS.get(format, ()):
        turns = value.get(name)
        turns = parsed_list(turns) if name in _ALWAYS_TURNS and not isinstance(turns, list) else turns
        if isinstance(turns, list) and turns:
            names += sorted({f"{name}[].{key}" for key in _keys_of_turns(turns, known)})
            if texts := sum(_is_call(turn) and _is_text(turn) for turn in turns):
                omissions.append(("CallsAsText", "calls", texts))
            names = [key for key in names if key not in ("tools", "functions")]
            if value.get("system") and isinstance(turns[0], Mapping) and _begins_with_system(turns[0]):
                names.append("system")
    return (
        [*(("KeysNotRead", printable(key), 1) for key in sorted(set(names))), *omissions] if names or omissions else []
    )


def is_desired(label: Any) -> bool:
    """Whether the label of an answer, as rows for KTO have it, says that it is a desired one."""
    return label is True or label == 1 or (isinstance(label, str) and label.lower() == "true")


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
    last = max(index for index, turn in enumerate(row.turns) if turn.role == "assistant" and turn.in_loss)
    for turn in row.turns[: last + 1]:  # nobody trains on what follows
        if turn.role == "assistant" and turn.in_loss:
            answers += 1
        if turn.content not in rendered and not has_text(rendered, turn.content):
            thought = reasoning.inline(turn.content) if turn.role == "assistant" else ""
            if not thought or not has_text(rendered, thought):
                omissions.append(("TemplateOmits", "reasoning" if thought else SUBJECTS[turn.role], 1))
            if thought and not has_text(rendered, reasoning.without_block(turn.content)):
                omissions.append(("TemplateOmits", SUBJECTS[turn.role], 1))
        if turn.more:
            more = json.loads(turn.more)
            thoughts = {more[key] for key in reasoning.KEYS if isinstance(more.get(key), str)}
            omissions += [("TemplateOmits", "reasoning", 1) for text in thoughts if not has_text(rendered, text)]
            omissions += [("TemplateOmits", "tool calls", 1) for name in _called(more) if name not in rendered]
            if isinstance(more.get("name"), str) and more["name"] not in rendered:
                omissions.append(("TemplateOmits", f"names of {SUBJECTS[turn.role]}", 1))
    if reordered := _reordered_results(row.turns, rendered):
        omissions.append(("TemplateOmits", "ids of tool results that are in another order than their calls", reordered))
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
    if not rendered or answer in rendered or has_text(_squeezed(rendered), _squeezed(answer)):
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


def has_text(rendered: str, content: str) -> bool:
    """Whether a text contains `content`, as it is or escaped as in JSON."""
    text = content.strip()
    return text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered


def _reordered_results(turns: Sequence[Turn], rendered: str) -> int:
    """Return how many results of tools only their ids assign to a call, if a text lacks these.

    A template that writes the ids writes each with its call and with its result.
    """
    count = 0
    calls: list[str] = []
    for turn in turns:
        more = json.loads(turn.more) if turn.more and turn.role in ("assistant", "tool") else {}
        if turn.role == "assistant":
            calls = [str(call.get("id")) for call in more.get("tool_calls", ())]
        elif turn.role == "tool" and calls:
            expected, name = calls.pop(0), more.get("tool_call_id")
            count += name is not None and str(name) != expected and rendered.count(str(name)) < 2
    return count


def _called(more: Mapping[str, Any]) -> list[str]:
    return _names(more.get("tool_calls", ()))


def _names(functions: Any) -> list[str]:
    inner = (function.get("function", function) for function in functions)
    return [str(function["name"]) for function in inner if isinstance(function, Mapping) and function.get("name")]


def _keys_of_turns(turns: list[Any], known: frozenset[str]) -> Iterator[str]:
    for turn in turns:
        if isinstance(turn, Mapping) and not known.issuperset(turn):
            read = known | _ITEM_KEYS if "type" in turn and "role" not in turn else known
            yield from (key for key in turn if key not in read and not _is_empty(turn[key]))


def _is_call(turn: Any) -> bool:
    """Whether the role of a turn is a call."""
    name = turn.get("role", turn.get("from")) if type(turn) is dict else None
    return name not in _USUAL and isinstance(name, str) and name.lower() in calls.ROLES


def _is_text(turn: Mapping[str, Any]) -> bool:
    """Whether the content of a turn whose role is a call isn't one."""
    key = "value" if turn.get("content") is None and "value" in turn else "content"
    return not turn.get("tool_calls") and not calls.of_turn(turn, key)[1]


def _begins_with_system(turn: Mapping[str, Any]) -> bool:
    return turn.get("role", turn.get("from")) in ("system", "developer")


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})
