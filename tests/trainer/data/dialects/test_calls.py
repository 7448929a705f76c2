"""Calls of functions and their results are real calls for the chat template, however a tool writes
them, and what can't be one is trained on as a text that is counted."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from finetune_trainer.data.example import Example
from finetune_trainer.data.reading import rows
from finetune_trainer.data.reading.dialects import calls
from finetune_trainer.data.reading.row import Row
from templates.families import FAMILIES
from templates.page import renderer

_USER = {"role": "user", "content": "Oslo?"}
_COLD = {"role": "assistant", "content": "cold"}
_JSON = '{"name": "forecast", "arguments": {"city": "Oslo"}}'
_ROME = '{"name": "forecast", "parameters": {"city": "Rome"}}'
_FUNCTION = {"name": "forecast", "parameters": {"type": "object"}}
_TOOL = {"type": "function", "function": _FUNCTION}
_SCHEMA = {"name": "forecast", "input_schema": {"type": "object"}}
_OSLO = ("forecast", {"city": "Oslo"})
_FAMILIES = {family.name: family for family in FAMILIES}


def _gpt(*turns: tuple[str, Any], **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": value} for name, value in turns], **keys}


def _chat(*turns: Any, **keys: Any) -> dict[str, Any]:
    return {"messages": list(turns), **keys}


def _row(record: dict[str, Any]) -> Row:
    read = rows.parse([json.dumps(record).encode()])
    assert read.problems == ()
    return read.rows[0]


def _contents(row: Row) -> list[tuple[str, str, Any]]:
    """Returns the role, the text, and the calls of each turn."""
    return [(turn.role[0], turn.content, _calls(turn.more)) for turn in row.turns]


def _calls(more: str) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in json.loads(more or "{}").get("tool_calls", ())]
    return [(function["name"], function["arguments"]) for function in functions]


def _text(role: str, content: str) -> tuple[str, str, Any]:
    return role, content, []


_ONE_CALL = [_text("u", "Oslo?"), ("a", "", [_OSLO]), _text("t", "-5"), _text("a", "cold")]
_TWO_CALLS = [
    _text("u", "Oslo?"), ("a", "", [_OSLO, ("forecast", {"city": "Rome"})]), _text("t", "-5"), _text("t", "9"),
    _text("a", "cold"),
]  # fmt: skip
_SHAPES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "LLaMA-Factory": (
        _gpt(("human", "Oslo?"), ("function_call", _JSON), ("observation", "-5"), ("gpt", "cold"), tools=[_TOOL]),
        _ONE_CALL,
    ),
    "LLaMA-Factory, parallel calls": (
        _gpt(("human", "Oslo?"), ("function_call", f"[{_JSON}, {_ROME}]"), ("observation", "-5"), ("observation", "9"),
             ("gpt", "cold")),
        _TWO_CALLS,
    ),
    "LLaMA-Factory, reasoning before the call": (
        _gpt(("human", "Oslo?"), ("function_call", f"<think>\nhm\n</think>\n\n{_JSON}"), ("observation", "-5"),
             ("gpt", "cold")),
        [_text("u", "Oslo?"), ("a", "<think>\nhm\n</think>", [_OSLO]), *_ONE_CALL[2:]],
    ),
    "other names of the roles": (
        _gpt(("human", "Oslo?"), ("function-call", _JSON), ("function-response", "-5"), ("gpt", "cold")), _ONE_CALL,
    ),
    "a call as an object": (
        _gpt(("human", "Oslo?"), ("tool_call", json.loads(_JSON)), ("tool_response", "-5"), ("gpt", "cold")), _ONE_CALL,
    ),
    "ms-swift, a turn for each call": (
        _chat(_USER, {"role": "tool_call", "content": _JSON}, {"role": "tool_call", "content": _ROME},
              {"role": "tool_response", "content": "-5"}, {"role": "tool_response", "content": "9"}, _COLD),
        _TWO_CALLS,
    ),
    "a text before its call": (
        _gpt(("human", "Oslo?"), ("gpt", "Let me look."), ("tool_call", _JSON), ("tool", "-5"), ("gpt", "cold")),
        [_text("u", "Oslo?"), ("a", "Let me look.", [_OSLO]), *_ONE_CALL[2:]],
    ),
    "Hermes with tools": (
        _gpt(("human", "Oslo?"), ("gpt", f"<tool_call>\n{_JSON}\n</tool_call>\n<tool_call>\n{_ROME}\n</tool_call>"),
             ("tool", "<tool_response>\n-5\n</tool_response>\n<tool_response>\n9\n</tool_response>"), ("gpt", "cold"),
             tools=json.dumps([_TOOL])),
        _TWO_CALLS,
    ),
    "Anthropic": (
        _chat(_USER, {"role": "assistant", "content": [
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "t1", "name": "forecast", "input": {"city": "Oslo"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1",
                                          "content": [{"type": "text", "text": "-5"}]}]}, _COLD),
        [_text("u", "Oslo?"), ("a", "Let me look.", [_OSLO]), *_ONE_CALL[2:]],
    ),
    "Anthropic, a question after a result": (
        _chat(_USER, {"role": "assistant", "content": [{"type": "tool_use", "name": "forecast", "input": {}}]},
              {"role": "user", "content": [{"type": "tool_result", "content": "-5"}, {"type": "text", "text": "So?"}]},
              _COLD),
        [_text("u", "Oslo?"), ("a", "", [("forecast", {})]), _text("t", "-5"), _text("u", "So?"), _text("a", "cold")],
    ),
    "Bedrock": (
        _chat({"role": "user", "content": [{"text": "Oslo?"}]},
              {"role": "assistant", "content": [{"toolUse": {"toolUseId": "t1", "name": "forecast",
                                                             "input": {"city": "Oslo"}}}]},
              {"role": "user", "content": [{"toolResult": {"toolUseId": "t1", "content": [{"json": -5}]}}]},
              {"role": "assistant", "content": [{"text": "cold"}]}),
        _ONE_CALL,
    ),
    "Gemini": (
        {"contents": [
            {"role": "user", "parts": [{"text": "Oslo?"}]},
            {"role": "model", "parts": [{"functionCall": {"name": "forecast", "args": {"city": "Oslo"}}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "forecast", "response": {"t": -5}}}]},
            {"role": "model", "parts": [{"text": "cold"}]}]},
        [*_ONE_CALL[:2], _text("t", '{"t": -5}'), _ONE_CALL[3]],
    ),
    "AI SDK": (
        _chat(_USER, {"role": "assistant", "content": [
            {"type": "tool-call", "toolCallId": "t1", "toolName": "forecast", "input": {"city": "Oslo"}}]},
            {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "t1", "toolName": "forecast",
                                          "output": {"type": "text", "value": "-5"}}]}, _COLD),
        _ONE_CALL,
    ),
    "items of the Responses API": (
        _chat(_USER, {"type": "function_call", "call_id": "t1", "name": "forecast", "arguments": '{"city": "Oslo"}'},
              {"type": "function_call_output", "call_id": "t1", "output": "-5"}, _COLD),
        _ONE_CALL,
    ),
    "xLAM": (
        {"query": "Oslo?", "answers": f"[{_JSON}]", "tools": json.dumps([_FUNCTION])},
        [_text("u", "Oslo?"), ("a", "", [_OSLO])],
    ),
    "a call without a function": (
        _chat(_USER, {"role": "assistant", "tool_calls": [{"id": "t1", **json.loads(_JSON)}]}),
        [_text("u", "Oslo?"), ("a", "", [_OSLO])],
    ),
    "parameters instead of arguments": (
        _chat(_USER, {"role": "assistant", "tool_calls": [{"function": json.loads(_ROME)}]}),
        [_text("u", "Oslo?"), ("a", "", [("forecast", {"city": "Rome"})])],
    ),
    "calls as JSON text": (
        _chat(_USER, {"role": "assistant", "content": "", "tool_calls": f"[{_JSON}]"}),
        [_text("u", "Oslo?"), ("a", "", [_OSLO])],
    ),
    "a legacy call as JSON text": (
        _chat(_USER, {"role": "assistant", "content": None, "function_call": _JSON}),
        [_text("u", "Oslo?"), ("a", "", [_OSLO])],
    ),
    "no calls as JSON text": (
        _chat(_USER, {"role": "assistant", "content": "cold", "tool_calls": "[]"}),
        [_text("u", "Oslo?"), _text("a", "cold")],
    ),
    "an object of lists, as datasets stores a sequence": (
        {"conversations": {"from": ["human", "tool_call", "tool", "gpt"], "value": ["Oslo?", _JSON, "-5", "cold"]}},
        _ONE_CALL,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), _SHAPES.values(), ids=_SHAPES)
def test_a_call_is_read_in_the_shape_of_any_tool(record: dict[str, Any], expected: list[Any]) -> None:
    row = _row(record)
    assert _contents(row) == expected
    assert row.unread == ()


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (_gpt(("human", "Oslo?"), ("tool_call", "{}"), ("tool_response", "r"), ("gpt", "cold")), "{}"),
        (_gpt(("human", "Oslo?"), ("function_call", "forecast(Oslo)"), ("gpt", "cold")), "forecast(Oslo)"),
        (_gpt(("human", "Oslo?"), ("function_call", '{"name": "f", "why": 1}'), ("gpt", "cold")),
         '{"name": "f", "why": 1}'),
    ],
    ids=["no name", "not JSON", "a key that would be lost"],
)  # fmt: skip
def test_a_call_that_isnt_one_is_a_text_and_counted(record: dict[str, Any], text: str) -> None:
    row = _row(record)
    assert _contents(row)[1] == _text("a", text)
    assert row.unread == (("CallsAsText", "calls", 1),)


def test_the_calls_of_hermes_stay_as_the_system_prompt_describes_them() -> None:
    call = f"<tool_call>\n{_JSON}\n</tool_call>"
    turns = [("system", "Use <tools>…</tools>."), ("human", "Oslo?"), ("gpt", call), ("tool", "-5"), ("gpt", "cold")]
    assert _contents(_row(_gpt(*turns, tools=[_TOOL])))[2] == _text("a", call)
    assert _contents(_row(_gpt(*turns[1:])))[1] == _text("a", call)


@pytest.mark.parametrize(
    "answer", ["<tool_call>{x}</tool_call>", f"<tool_call>{_JSON}</tool_call> and so on", f"<tool_call>{_JSON}"],
    ids=["not JSON", "a text after it", "no end"],
)  # fmt: skip
def test_tags_without_calls_are_a_text(answer: str) -> None:
    assert _contents(_row(_gpt(("human", "Oslo?"), ("gpt", answer), tools=[_TOOL])))[1] == _text("a", answer)


@pytest.mark.parametrize(
    "answer",
    [
        "<tool_call>{}</tool_call>" * 40_000 + "x",
        "<tool_call>{}</tool_call>" * 40_000,
        " " * 1_000_000 + "<tool_call>",
        "x</tool_call>" * 80_000,
    ],
    ids=["calls in a text", "calls without names", "space", "closing tags"],
)
def test_long_answers_with_tags_take_time_in_proportion(answer: str) -> None:
    begin = time.process_time()
    assert calls.of_tags(answer) == (answer, [])
    assert time.process_time() - begin < 2  # hours in the square of the length


def test_calls_that_arent_trained_on_are_no_part_of_an_answer_that_is() -> None:
    call = {"from": "tool_call", "value": _JSON, "loss": False}
    turns = [{"from": "human", "value": "Oslo?"}, {"from": "gpt", "value": "I look."}, call]
    row = _row({"conversations": [*turns, {"from": "tool", "value": "-5"}, {"from": "gpt", "value": "cold"}]})
    assert [(turn.role[0], turn.in_loss) for turn in row.turns if turn.role == "assistant"] == [
        ("a", True), ("a", False), ("a", True),
    ]  # fmt: skip


_CALLING = _gpt(("human", "Oslo?"), ("function_call", _JSON), ("observation", "-5"), ("gpt", "cold"), tools=[_FUNCTION])


def _trained(family: str, record: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Returns the texts that are trained on, and what is lost."""
    using = renderer(_FAMILIES[family])
    outcome = using.render(_row(record))
    assert isinstance(outcome, Example)
    texts: list[str] = []
    for example in (*outcome.earlier, outcome):
        begins = [i for i in range(1, len(example.ids)) if example.loss_mask[i] and not example.loss_mask[i - 1]]
        for begin in begins:
            end = next((i for i in range(begin, len(example.ids)) if not example.loss_mask[i]), len(example.ids))
            texts.append(str(using.tokenizer.decode(list(example.ids[begin:end]))))
    return texts, [omission for omission in outcome.omissions if omission[0] != "AnswersApart"]


def test_a_call_is_written_as_the_template_writes_calls() -> None:
    call = '{"name": "forecast", "arguments": {"city": "Oslo"}}'
    assert _trained("Qwen2.5", _CALLING) == ([f"<tool_call>{call}</tool_call><|im_end|>", "cold<|im_end|>"], [])
    texts, _ = _trained("gpt-oss", _CALLING)
    assert texts[0] == ' to=functions.forecast<|channel|>commentary<|message|>{"city": "Oslo"}<|call|>'


@pytest.mark.parametrize("family", ["ChatML (SmolLM2)", "Llama 3", "Phi-4"])
def test_a_template_without_calls_gets_the_text_of_the_row_and_it_is_counted(family: str) -> None:
    texts, lost = _trained(family, _CALLING)
    assert [text.partition("<|")[0] for text in texts] == [_JSON, "cold"]
    assert lost == [("CallsAsText", "calls", 1)]
    row = _row(_CALLING)
    prompt = renderer(_FAMILIES[family]).tokenizer.decode(renderer(_FAMILIES[family]).prompt(row))
    assert _JSON in prompt


def test_tags_that_the_template_writes_as_well_are_counted() -> None:
    family = _FAMILIES["Qwen2.5"]
    tagged = family.template.replace(
        "(m.content or '')", "('<tool_response>' if m.role == 'tool' else '') + (m.content or '')"
    )
    using = renderer(family)
    using.tokenizer.chat_template = tagged
    turns = [("human", "Oslo?"), ("gpt", "<tool_call>…</tool_call>"), ("tool", "<tool_response>-5"), ("gpt", "cold")]
    outcome = type(using)(using.tokenizer, using.stops, max_length=999).render(_row(_gpt(*turns)))
    assert isinstance(outcome, Example)
    assert outcome.omissions == (("TagsTwice", "tool results with <tool_response>", 1),)
    outcome = renderer(family).render(_row(_gpt(*turns)))
    assert isinstance(outcome, Example)
    assert outcome.omissions == ()


_TOOLS: dict[str, tuple[Any, Any]] = {
    "a function alone": ([_FUNCTION], [_TOOL]),
    "a function of the Responses API": ([{"type": "function", **_FUNCTION}], [_TOOL]),
    "Anthropic": ([_SCHEMA], [_TOOL]),
    "Bedrock": ([{"toolSpec": {"name": "forecast", "inputSchema": {"json": {"type": "object"}}}}], [_TOOL]),
    "Gemini": ([{"functionDeclarations": [_FUNCTION, _FUNCTION]}], [_TOOL, _TOOL]),
    "JSON texts in a list": ([json.dumps(_FUNCTION)], [_TOOL]),
    "JSON text": (json.dumps([_FUNCTION]), [_TOOL]),
    "as an API has it": ([_TOOL], [_TOOL]),
    "another kind of tool": ([{"type": "web_search"}], [{"type": "web_search"}]),
}


@pytest.mark.parametrize(("tools", "expected"), _TOOLS.values(), ids=_TOOLS)
def test_a_function_is_given_to_the_template_as_an_api_gives_it(tools: Any, expected: Any) -> None:
    assert json.loads(_row(_chat(_USER, _COLD, tools=tools)).tools) == expected


def test_the_tools_and_the_system_prompt_of_other_apis_are_read() -> None:
    bedrock = _chat(_USER, _COLD, system=[{"text": "S"}], toolConfig={"tools": [{"toolSpec": _SCHEMA}]})
    instruction = {"parts": [{"text": "S"}]}
    gemini = {"systemInstruction": instruction, "contents": [
        {"role": "user", "parts": [{"text": "Oslo?"}]},
        {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": "cold"}]}],
        "tools": [{"functionDeclarations": [_FUNCTION]}]}  # fmt: skip
    for record in (bedrock, gemini):
        row = _row(record)
        assert _contents(row) == [_text("s", "S"), _text("u", "Oslo?"), _text("a", "cold")]
        assert json.loads(row.tools) == [_TOOL]
    assert json.loads(row.turns[-1].more) == {"reasoning_content": "Hm."}


_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a call without a name": (
        _chat(_USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}),
        "messages[1].tool_calls[0].function has no name of a function (it has arguments); write it in name",
    ),
    "arguments with a key twice": (
        _chat(_USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x":1,"x":2}'}}]}),
        "messages[1].tool_calls[0].function.arguments has the key 'x' twice in one object; remove one",
    ),
    "turns with a key twice": (
        {"messages": '[{"role":"user","content":"a","content":"b"},{"role":"assistant","content":"c"}]'},
        "messages has the key 'content' twice in one object; remove one",
    ),
    "tools with a key twice": (
        _chat(_USER, _COLD, tools='[{"name":"f","name":"g"}]'), "tools has the key 'name' twice in one object",
    ),
    "tools without a name": (
        _chat(_USER, _COLD, tools={"forecast": {}}), "tools[0] has no name of a function (it has forecast)",
    ),
    "a result that isn't of a tool": (
        _chat(_USER, {"role": "assistant", "content": [{"type": "tool_result", "content": "x"}]}),
        "is of type 'tool_result', which isn't text; write it as a turn of the role tool",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "message"), _REFUSED.values(), ids=_REFUSED)
def test_a_call_that_cant_be_meant_is_refused(record: dict[str, Any], message: str) -> None:
    read = rows.parse([json.dumps(record).encode()])
    assert read.rows == ()
    assert message in read.problems[0].message


def test_keys_of_turns_as_json_text_are_counted() -> None:
    turns = [_USER, {**_COLD, "mood": "glad"}]
    assert _row({"messages": json.dumps(turns)}).unread == (("KeysNotRead", "messages[].mood", 1),)
