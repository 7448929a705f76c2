"""Rows and files in further shapes that people have: read as they are meant, or refused with the
value and the remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather

from finetune_trainer.data.reading import rows
from finetune_trainer.data.reading.row import Row
from finetune_trainer.errors import RunError

_USER = {"role": "user", "content": "sky?"}
_BLUE = {"role": "assistant", "content": "blue"}
_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
_CALLS = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
_PAIR = '{"prompt": "sky?", "completion": "blue"}\n'


def _chat(*turns: Any, **keys: Any) -> dict[str, Any]:
    return {"messages": list(turns), **keys}


def _answer(**turn: Any) -> dict[str, Any]:
    return {"role": "assistant", **turn}


def _question(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def _texts(row: Row) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in row.turns]


_READ: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "parts that are strings": (_chat(_question("sky", "?"), _BLUE), [("user", "sky?"), ("assistant", "blue")]),
    "parts of the Responses API": (
        _chat(_question({"type": "input_text", "text": "sky?"}),
              _answer(content=[{"type": "output_text", "text": "blue"}])),
        [("user", "sky?"), ("assistant", "blue")],
    ),
    "parts without a type, and a system prompt of parts": (
        _chat(_question({"text": "sky?"}), _answer(content=[{"text": "blue"}]), system=[{"text": "S"}]),
        [("system", "S"), ("user", "sky?"), ("assistant", "blue")],
    ),
    "one part instead of a list": (
        _chat(_USER, _answer(content={"type": "text", "text": "blue"})), [("user", "sky?"), ("assistant", "blue")],
    ),
    "a tool's result as an object": (
        _chat(_USER, _CALLS, {"role": "tool", "content": {"t": 5}}, _BLUE),
        [("user", "sky?"), ("assistant", ""), ("tool", '{"t": 5}'), ("assistant", "blue")],
    ),
    "a tool's result as a list": (
        _chat(_USER, _CALLS, {"role": "tool", "content": [5, 6]}, _BLUE),
        [("user", "sky?"), ("assistant", ""), ("tool", "[5, 6]"), ("assistant", "blue")],
    ),
    "turns and a text": ({"prompt": [_USER], "completion": "blue"}, [("user", "sky?"), ("assistant", "blue")]),
    "turns and one turn": ({"prompt": [_USER], "completion": _BLUE}, [("user", "sky?"), ("assistant", "blue")]),
    "a text and turns": ({"prompt": "sky?", "completion": [_BLUE]}, [("user", "sky?"), ("assistant", "blue")]),
    "a system turn in the middle": (
        _chat(_USER, _BLUE, {"role": "system", "content": "Be brief."}, _USER, _BLUE),
        [("user", "sky?"), ("assistant", "blue"), ("system", "Be brief."), ("user", "sky?"), ("assistant", "blue")],
    ),
    "an accepted label": (
        {"text": "good", "label": "yes", "answer": "accept"}, [("user", "good"), ("assistant", "yes")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), _READ.values(), ids=_READ)
def test_a_row_is_read_as_it_is_meant(record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    read = rows.parse([json.dumps(record).encode()])
    assert read.problems == ()
    assert _texts(read.rows[0]) == expected
    assert read.rows[0].unread == ()


def test_reasoning_among_parts_is_the_reasoning_of_the_turn() -> None:
    content = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "blue"}]
    (row,) = rows.parse([json.dumps(_chat(_USER, _answer(content=content))).encode()]).rows
    assert _texts(row)[-1] == ("assistant", "blue")
    assert json.loads(row.turns[-1].more) == {"reasoning_content": "Hm."}


@pytest.mark.parametrize(("arguments", "expected"), [("", {}), ('{"x": 1}', {"x": 1}), ("[1]", [1])])
def test_arguments_are_what_their_json_says(arguments: str, expected: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    (row,) = rows.parse([json.dumps(_chat(_USER, _answer(content=None, tool_calls=[call]))).encode()]).rows
    assert json.loads(row.turns[-1].more)["tool_calls"][0]["function"]["arguments"] == expected


_REFUSED: dict[str, tuple[Any, str]] = {
    "a refusal": (_chat(_USER, _answer(content=None, refusal="No.")), "content is null (it has refusal, role); write"),
    "an audio answer": (_chat(_USER, _answer(content=None, audio={"id": "a"})), "is null (it has audio, role); write"),
    "reasoning as an object": (
        _chat(_USER, _answer(content="blue", reasoning={"a": 1})), "reasoning is {'a': 1}, which isn't text; write",
    ),
    "arguments that aren't JSON": (
        _chat(_USER, _answer(tool_calls=[{"function": {"name": "f", "arguments": "{x: 1"}}])),
        "messages[1].tool_calls[0].function.arguments is '{x: 1', which isn't JSON; write an object",
    ),
    "an image among parts": (
        _chat(_question({"type": "image_url"}), _BLUE), "content[0] is of type 'image_url', which isn't text; remove",
    ),
    "a call among parts": (
        _chat(_USER, _answer(content=[{"type": "tool_use"}])), "is of type 'tool_use', which isn't text; write it in",
    ),
    "an image beside turns": (
        _chat({"role": "user", "content": "<image>What?"}, _BLUE, images=["a.png"]), "<image> and it has images",
    ),
    "a turn that is a text": (_chat("sky?", _BLUE), "messages[0] is 'sky?'; it must be an object"),
    "one turn of a tree": ({"role": "prompter", "text": "sky?", "parent_id": None}, "role ('prompter'), which is one"),
    "tools in words": (_chat(_USER, _BLUE, tools="f"), "tools is 'f', which isn't JSON; write a list"),
    "rows of tokens": ({"input_ids": [1], "labels": [1]}, "is tokenized already (input_ids); give the texts"),
    "a list": (["a"], "is ['a'], which isn't a JSON object; write an object"),
    "a list of turns": ([_USER, _BLUE], 'write {"messages": [...]}'),
    "a question and an answer": (
        {"question": "a", "answer": "b"}, "dataset.columns, such as {prompt: question, completion: answer}",
    ),
    "a context": (
        {"instruction": "a", "context": "b", "response": "c"},
        "such as {instruction: instruction, input: context, output: response}",
    ),
    "a system prompt": (
        {"system_prompt": "s", "question": "a", "response": "b"},
        "such as {prompt: question, completion: response, system: system_prompt}",
    ),
    "turns under another key": ({"conversation": [_USER, _BLUE]}, "such as {messages: conversation}"),
    "turns and an ideal answer": ({"input": [_USER], "ideal": "blue"}, "such as {prompt: input, completion: ideal}"),
    "an undesirable answer": ({"prompt": "a", "completion": "b", "label": "undesirable"}, "marks the answer as undes"),
    "spans as a label": ({"text": "Alice", "label": [[0, 5]]}, "write labels of parts of a text as prompt"),
}  # fmt: skip


@pytest.mark.parametrize(("record", "message"), _REFUSED.values(), ids=_REFUSED)
def test_a_row_is_refused_with_its_value_and_the_remedy(record: Any, message: str) -> None:
    read = rows.parse([json.dumps(record).encode()])
    assert read.rows == ()
    assert message in read.problems[0].message


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "responses": ["b", "c"], "ranking": [2, 1]},
        {"prompt": "a", "completions": ["b", "c"], "scores": [2, 1]},
        {"question": "a", "answer_0": "b", "answer_1": "c"},
        {"prompt": "a", "answers": [{"answer": "b", "rank": 1}]},
    ],
    ids=["a ranking", "scores", "two answers", "ranks"],
)
def test_ranked_answers_are_refused_by_name(record: dict[str, Any]) -> None:
    (problem,) = rows.parse([json.dumps(record).encode()], "preference").problems
    assert "answers that are ranked or scored" in problem.message
    assert "for each comparison" in problem.message


@pytest.mark.parametrize(("label", "is_read"), [(True, True), (1, True), ("true", True), ("bad?", False), (3, False)])
def test_a_label_that_doesnt_say_desired_isnt_read(label: Any, is_read: bool) -> None:
    (row,) = rows.parse([json.dumps({"prompt": "a", "completion": "b", "label": label}).encode()]).rows
    assert row.unread == (() if is_read else (("KeysNotRead", "label", 1),))


def test_a_rejected_label_isnt_a_label() -> None:
    (problem,) = rows.parse([b'{"text": "Alice", "label": "PER", "answer": "reject"}']).problems
    assert problem.unlabelled
    assert "answer is 'reject'" in problem.message


def test_a_row_of_another_format_says_so() -> None:
    read = rows.parse([_PAIR.encode(), json.dumps(_chat(_USER, _BLUE)).encode()])
    (problem,) = read.problems
    assert problem.message.startswith("is a row of messages, but those before it are rows of prompt-completion")


def test_a_question_without_text_is_counted() -> None:
    (row,) = rows.parse([b'{"prompt": " ", "completion": "b"}']).rows
    assert row.unread == (("EmptyQuestions", "questions", 1),)


_LINES: dict[str, tuple[bytes, str]] = {
    "the same key twice": (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "the key 'prompt' twice"),
    "a comma at the end": (b'{"prompt": "a"},', "the comma at the end of the line has to go"),
    "a comma before a bracket": (b'{"prompt": "a",}', "a comma before a bracket has to go"),
    "Python's quotes": (b"{'prompt': 'a'}", "Python's own notation: write it with json.dumps"),
    "Python's None": (b'{"prompt": None}', "Python's None: write it with json.dumps"),
    "a comment": (b"// a comment", "JSON has no comments: remove the line"),
    "a number of 5,000 digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "more than 4,300 digits; write it as a string"),
    "a byte order mark": (b"\xef\xbb\xbf", "only a byte order mark"),
}


@pytest.mark.parametrize(("line", "message"), _LINES.values(), ids=_LINES)
def test_a_line_that_isnt_a_row_has_the_remedy(line: bytes, message: str) -> None:
    (problem,) = rows.parse([line]).problems
    assert message in problem.message


_FILES: dict[str, tuple[str, bytes, str]] = {
    "a Git LFS pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    "a page": ("a.jsonl", b"<!DOCTYPE html><html>", "is a web page"),
    "a workbook": ("a.xlsx", b"PK\x03\x04" + bytes(40), "is an Excel workbook; save it as CSV"),
    "an archive": ("a.zip", b"PK\x03\x04" + bytes(40), "is an archive of several files; unpack it"),
    "a database": ("a.db", b"SQLite format 3\x00", "is an SQLite database; export"),
    "Feather version 1": ("a.feather", b"FEA1" + bytes(60), "is Feather version 1; save it as Feather version 2"),
    "a text": ("a.txt", b"Once upon a time.\nThere was a fox.\n", "begins with 'Once upon a time.', which is neither"),
    "YAML": ("a.yaml", b"- prompt: a\n  completion: b\n", "begins with '- prompt: a', which is neither"),
    "a torn download": ("a.jsonl.gz", gzip.compress(_PAIR.encode() * 99)[:-9], "the gzip data can't be unpacked"),
}


@pytest.mark.parametrize(("name", "content", "message"), _FILES.values(), ids=_FILES)
def test_a_file_without_rows_has_the_remedy(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError) as refused:
        rows.read(tmp_path / name)
    assert message in refused.value.message
    assert "the file the" not in refused.value.message
    assert ";" in refused.value.message


def test_feather_is_arrow(tmp_path: Path) -> None:
    feather.write_feather(pa.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "a.feather")
    assert [_texts(row) for row in rows.read(tmp_path / "a.feather").rows] == [[("user", "a"), ("assistant", "b")]]


def test_rows_by_their_index_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"0": {"prompt": "a", "completion": "b"}, "1": {"prompt": "c", "completion": "d"}}))
    assert [row.turns[0].content for row in rows.read(path).rows] == ["a", "c"]
