"""A row is trained on as it was meant, or refused: no answer is read as something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.spec.rendering import RenderingSpec
from finetune_trainer.data.reading import rows
from finetune_trainer.data.reading.row import Problem, Row

_USER = {"role": "user", "content": "sky?"}
_BLUE = {"role": "assistant", "content": "blue"}
_GREEN = {"role": "assistant", "content": "green"}
_SYSTEM = {"role": "system", "content": "Be brief."}


def _read(*values: Any, format: str = "auto") -> rows.Rows:
    return rows.parse([json.dumps(value).encode() for value in values], format)


def _roles_and_texts(row: Row) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in row.turns]


@pytest.mark.parametrize(
    ("prompt", "before", "expected"),
    [
        pytest.param({"prompt": "sky?"}, [_USER], ["user"], id="a text"),
        pytest.param({"prompt": "sky? \n"}, [_USER], ["user"], id="a text with blanks"),
        pytest.param({"prompt": [_USER]}, [_USER], ["user"], id="turns"),
        pytest.param({"prompt": [_SYSTEM, _USER]}, [_SYSTEM, _USER], ["system", "user"], id="with a system turn"),
        pytest.param({"prompt": [_SYSTEM, _USER]}, [_USER], ["system", "user"], id="system turn in the prompt only"),
        pytest.param({"prompt": [_USER]}, [_SYSTEM, _USER], ["system", "user"], id="system turn in the answers only"),
        pytest.param({"prompt": "sky?", "system": "S"}, [_USER], ["system", "user"], id="a system key"),
        pytest.param({"prompt": "sky?"}, [_USER, _GREEN, _USER], ["user", "assistant", "user"], id="a dialogue"),
        pytest.param(
            {"prompt": "sea?"}, [_USER, _GREEN, {"role": "user", "content": "sea?"}], ["user", "assistant", "user"],
            id="the last question of a dialogue",
        ),
        pytest.param({"prompt": [_USER]}, [], ["user"], id="answers without the prompt"),
        pytest.param({}, [_USER], ["user"], id="no prompt"),
    ],
)  # fmt: skip
def test_a_pair_has_its_prompt_once(prompt: dict[str, Any], before: list[Any], expected: list[str]) -> None:
    read = _read({**prompt, "chosen": [*before, _BLUE], "rejected": [*before, _GREEN]})
    assert read.problems == ()
    (row,) = read.rows
    assert [turn.role for turn in row.turns] == [*expected, "assistant"]
    assert [turn.role for turn in row.rejected] == [*expected, "assistant"]
    assert (row.turns[-1].content, row.rejected[-1].content) == ("blue", "green")


def test_a_pair_of_turns_may_have_texts_as_answers() -> None:
    (row,) = _read({"prompt": [_SYSTEM, _USER], "chosen": "blue", "rejected": "green"}).rows
    assert _roles_and_texts(row) == [("system", "Be brief."), ("user", "sky?"), ("assistant", "blue")]


def test_answers_that_begin_with_another_question_are_refused() -> None:
    other = {"role": "user", "content": "sea?"}
    (problem,) = _read({"prompt": "sky?", "chosen": [other, _BLUE], "rejected": [other, _GREEN]}).problems
    assert "chosen begins with a user turn ('sea?') that isn't the prompt" in problem.message


@pytest.mark.parametrize("label", [False, 0, "false", "False"])
@pytest.mark.parametrize(
    "row", [{"prompt": "sky?", "completion": "green"}, {"messages": [_USER, _GREEN]}], ids=["texts", "messages"]
)
def test_an_undesired_answer_is_refused(row: dict[str, Any], label: Any) -> None:
    read = _read({**row, "label": label}, {**row, "label": True})
    assert [usable.number for usable in read.rows] == [2]
    assert "label" in read.problems[0].message
    assert "KTO" in read.problems[0].message


_REGIONS = [
    {"start": 0, "end": 5, "text": "Alice", "labels": ["PER"]},
    {"start": 15, "end": 19, "text": "Oslo", "labels": ["LOC"]},
]


_ALICE = {"text": "Alice", "labels": ["PER"], "start": 0, "end": 5}
_OSLO = {"text": "Oslo", "labels": ["LOC"], "start": 15, "end": 19}
_LIVES_IN = {"from_id": "a", "to_id": "b", "type": "relation", "direction": "right", "labels": ["lives in"]}


def _task(values: list[Any], *further: Any) -> dict[str, Any]:
    results = [
        {"id": name, "value": value, "from_name": "label", "to_name": "text", "type": "labels"}
        for name, value in zip("ba", reversed(values), strict=False)
    ]
    return {"id": 1, "data": {"text": "Alice lives in Oslo."}, "annotations": [{"result": [*results, *further]}]}


def _record_of(label: Any) -> dict[str, Any]:
    return {"id": 1, "text": "Alice lives in Oslo.", "label": label, "annotator": 1, "annotation_id": 2}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        pytest.param(_task(_REGIONS), [_ALICE, _OSLO], id="JSON"),
        pytest.param(_record_of(_REGIONS), [_ALICE, _OSLO], id="JSON-MIN"),
        pytest.param(_record_of(json.dumps(_REGIONS)), [_ALICE, _OSLO], id="CSV"),
        pytest.param(_record_of([{"start": "/p[1]", "end": "/p[1]", "globalOffsets": {"start": 15, "end": 19},
                                  "hypertextlabels": ["LOC"]}]), [_OSLO], id="HTML"),
        pytest.param(_task(_REGIONS, _LIVES_IN),
                     {"regions": [{"id": 1, **_ALICE}, {"id": 2, **_OSLO}],
                      "relations": [{"from": 1, "to": 2, "labels": ["lives in"]}]}, id="a relation"),
        pytest.param(_task(_REGIONS, _LIVES_IN | {"direction": "left"}),
                     {"regions": [{"id": 1, **_ALICE}, {"id": 2, **_OSLO}],
                      "relations": [{"from": 2, "to": 1, "labels": ["lives in"]}]}, id="a relation to the left"),
    ],
)  # fmt: skip
def test_labels_of_regions_are_the_answer_as_json(record: dict[str, Any], expected: Any) -> None:
    read = _read(record)
    assert read.problems == ()
    assert json.loads(read.rows[0].turns[1].content) == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        pytest.param(_record_of([{"start": "/p[1]", "end": "/p[1]", "text": "A", "hypertextlabels": ["X"]}]),
                     "none of the regions of a text", id="HTML without offsets"),
        pytest.param(_record_of([{"start": 0, "end": 1, "text": "A", "choices": ["X"]}]),
                     "none of the regions of a text", id="a choice per region"),
        pytest.param(_record_of([{"x": 1, "y": 2, "rectanglelabels": ["cat"]}]),
                     "none of the regions of a text", id="a part of an image"),
        pytest.param(_record_of([{"start": 9, "end": 99, "labels": ["X"]}]), "9 to 99 isn't in its text",
                     id="beyond the text"),
        pytest.param(_task([{"choices": ["X"]}], _LIVES_IN), "relations between parts", id="a relation of choices"),
        pytest.param(_task(_REGIONS, _LIVES_IN | {"to_id": "z"}), "refers to 'z'", id="an unknown region"),
    ],
)  # fmt: skip
def test_labels_of_what_isnt_text_are_refused_instead_of_lost(record: dict[str, Any], message: str) -> None:
    read = _read(record)
    assert read.rows == ()
    assert message in read.problems[0].message


_CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}
_FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_a_legacy_function_call_is_a_tool_call(content: str | None) -> None:
    call = {"role": "assistant", "content": content, "function_call": _CALL}
    result = {"role": "function", "name": "weather", "content": "cold"}
    legacy = {"messages": [_USER, call, result, _BLUE], "functions": [_FUNCTION]}
    called = {"type": "function", "function": _CALL}
    current = {
        "messages": [
            _USER,
            {"role": "assistant", "content": content, "tool_calls": [called]},
            {"role": "tool", "name": "weather", "content": "cold"},
            _BLUE,
        ],
        "tools": [{"type": "function", "function": _FUNCTION}],
    }
    first, second = _read(legacy).rows + _read(current).rows
    assert first == second
    assert json.loads(first.turns[1].more)["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}


def test_roles_of_other_tools_are_understood() -> None:
    turns = [{"role": "developer", "content": "s"}, {"role": "human", "content": "q"}, {"role": "ai", "content": "a"}]
    (row,) = _read({"messages": turns}).rows
    assert [turn.role for turn in row.turns] == ["system", "user", "assistant"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"loss": 0}])
@pytest.mark.parametrize("format", ["messages", "conversations"])
def test_a_turn_that_must_not_be_trained_on_isnt(mark: dict[str, Any], format: str) -> None:
    turns = [_USER, {**_GREEN, **mark}, _USER, _BLUE]
    if format == "conversations":
        turns = [
            {"from": turn["role"], "value": turn["content"], **({} if turn != turns[1] else mark)} for turn in turns
        ]
    (row,) = _read({format: turns}).rows
    assert [turn.in_loss for turn in row.turns if turn.role == "assistant"] == [False, True]


def test_a_mark_that_says_neither_yes_nor_no_is_refused() -> None:
    (problem,) = _read(
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0.5}]}
    ).problems
    assert "conversations[1].weight is 0.5; it must be 0 (not trained on) or 1" in problem.message


_THINKING = {"role": "assistant", "content": "<think>hm</think>\nblue", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("rendering", "turns", "expected", "lost"),
    [
        pytest.param({}, [_USER, _BLUE, _USER], None, [], id="ends with a question"),
        pytest.param({"open_turns": "cut"}, [_USER, _BLUE, _USER], "ua", [("TurnsCut", 1)], id="cut at the end"),
        pytest.param({}, [_GREEN, _USER, _BLUE], None, [], id="begins with an answer"),
        pytest.param({"open_turns": "cut"}, [_GREEN, _USER, _BLUE], "ua", [("TurnsCut", 1)], id="a greeting is cut"),
        pytest.param(
            {"open_turns": "cut"}, [_SYSTEM, _GREEN, _USER, _BLUE, _USER], "sua", [("TurnsCut", 2)], id="both"
        ),
        pytest.param({"open_turns": "cut"}, [_USER], None, [], id="no answer"),
        pytest.param({}, [_USER, {**_GREEN, "content": " "}, _USER, _BLUE], "uaua", [("EmptyAnswers", 1)], id="empty"),
        pytest.param({"reasoning": "remove"}, [_USER, _THINKING], "ua", [], id="without reasoning"),
        pytest.param({"whitespace": "strip"}, [_USER, {**_BLUE, "content": " blue\n"}], "ua", [], id="stripped"),
    ],
)
def test_turns_are_adjusted_as_the_job_says_and_counted(
    rendering: dict[str, str], turns: list[Any], expected: str | None, lost: list[tuple[str, int]]
) -> None:
    file = rows.InputFile(Path(), rendering=RenderingSpec.model_validate(rendering))
    (row,) = rows.Stream([(1, {"messages": turns})], file)
    if expected is None:
        assert isinstance(row, Problem)
        assert "dataset.rendering.openTurns" in row.message
        return
    assert isinstance(row, Row)
    assert "".join(turn.role[0] for turn in row.turns) == expected
    assert row.turns[-1].content == "blue"
    assert row.turns[-1].more == ""
    assert [(reason, count) for reason, _, count in row.unread] == lost


def test_keys_of_labeling_exports_that_nothing_reads_are_named() -> None:
    task = {
        "data": {"text": "sky?", "author": "A"},
        "annotations": [{"result": [
            {"from_name": "answer", "to_name": "text", "value": {"text": ["blue"]}},
            {"from_name": "mood", "to_name": "text", "value": {"choices": ["glad"]}}]}],
    }  # fmt: skip
    (row,) = _read(task).rows
    assert [subject for _, subject, _ in row.unread] == ["annotations.mood", "data.author"]
    (row,) = _read({"text": "sky?", "label": "blue", "annotator_note": "x"}, format="snorkel").rows
    assert [subject for _, subject, _ in row.unread] == ["annotator_note"]
