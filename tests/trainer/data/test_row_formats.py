"""Rows are read strictly, and every problem is reported with the line's number."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.reading import rows
from finetune_trainer.data.reading.row import Problem, Row, Turn

_PAIR = {"prompt": "a", "completion": "b"}
_CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def _read(*values: Any, format: str = "auto") -> rows.Rows:
    return rows.parse([(v if isinstance(v, str) else json.dumps(v)).encode() for v in values], format)


def test_prompt_and_completion_become_two_turns() -> None:
    read = _read(_PAIR)
    assert read.format == "prompt-completion"
    assert read.rows == (Row(1, (Turn("user", "a"), Turn("assistant", "b")), plain=True),)


def test_messages_become_their_turns() -> None:
    read = _read({"messages": [{"role": "system", "content": "s"}, *_CHAT["messages"]]})
    assert read.format == "messages"
    assert [turn.role for turn in read.rows[0].turns] == ["system", "user", "assistant"]


def test_blank_lines_count_as_lines_but_arent_rows() -> None:
    read = _read("", _PAIR, "  ", {"prompt": "x"})
    assert read.rows[0].number == 2
    assert read.problems == (
        Problem(4, "completion is missing (it has prompt); map one in dataset.columns.completion"),
    )


def test_a_byte_order_mark_and_windows_line_ends_are_accepted() -> None:
    read = rows.parse([b"\xef\xbb\xbf" + json.dumps(_PAIR).encode() + b"\r\n"])
    assert len(read.rows) == 1


def test_further_keys_are_ignored() -> None:
    assert len(_read({**_PAIR, "id": 7, "meta": {}}).rows) == 1


def test_equal_rows_are_counted_but_not_removed() -> None:
    read = _read(_PAIR, _PAIR, {"prompt": "a", "completion": "c"}, _PAIR)
    assert (read.duplicates, len(read.rows)) == (2, 4)


_BAD: list[tuple[str, Any, str]] = [
    ("broken", '{"prompt": ', "isn't JSON (Expecting value at column 12)"),
    ("list", [1], "is [1], which isn't a JSON object"),
    ("no completion", {"prompt": "a"}, "completion is missing"),
    ("no prompt", {"completion": "a"}, "prompt is missing"),
    ("empty completion", {"prompt": "a", "completion": " \n"}, "completion is empty"),
    ("object", {"prompt": "a", "completion": {"b": 3}}, "completion is {'b': 3}, which isn't text"),
    ("null", {"prompt": None, "completion": "a"}, "prompt is missing (it has completion)"),
    (
        "surrogate",
        '{"prompt": "a", "completion": "\\ud800"}',
        "completion contains half a character",
    ),
]
_BAD_CHATS: list[tuple[str, Any, str]] = [
    ("no messages", {"prompt": "a"}, "is a row of prompt-completion, but those before it are rows of messages"),
    ("no keys", {"a": 1}, "messages is missing (it has a)"),
    ("not a list", {"messages": "a"}, "messages is 'a', a text that isn't a JSON list of turns"),
    ("empty", {"messages": []}, "messages is []; it must be a list with at least one turn"),
    ("role", {"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role is 'bot'"),
    ("turn", {"messages": ["hi"]}, "messages[0] is 'hi'; it must be an object"),
    ("content", {"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    ("last", {"messages": _CHAT["messages"][:1]}, "the last turn's role is 'user'"),
    ("first", {"messages": _CHAT["messages"][1:]}, "there is nothing to answer"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("good", "value", "message"),
    [pytest.param(_PAIR, value, message, id=name) for name, value, message in _BAD]
    + [pytest.param(_CHAT, value, message, id=f"chat {name}") for name, value, message in _BAD_CHATS],
)
def test_a_row_that_cant_be_used_is_reported_by_number_and_field(good: Any, value: Any, message: str) -> None:
    (problem,) = _read(good, value, good).problems
    assert problem.number == 2
    assert message in problem.message


def test_a_line_that_isnt_utf8_is_reported() -> None:
    (problem,) = rows.parse([b'{"prompt": "\xff"}']).problems
    assert problem.message.startswith("isn't UTF-8 (byte 12); it looks like WINDOWS-1252: save it as UTF-8")


def test_a_file_of_an_unknown_format_is_reported_with_its_keys() -> None:
    read = _read({"headline": "a", "label": 1})
    assert read.format is None
    assert "its keys: headline, label" in read.problems[0].message


def test_a_format_that_the_user_sets_isnt_guessed() -> None:
    assert "prompt is missing" in _read(_CHAT, format="prompt-completion").problems[0].message


def test_a_listing_shows_ten_problems_and_counts_the_rest() -> None:
    problems = [Problem(number, "bad") for number in range(30, 0, -1)]
    listed = rows.listing(problems)
    assert listed.startswith("row 1: bad; row 2: bad")
    assert listed.endswith("row 10: bad; and 20 more")


@given(st.lists(st.binary(max_size=80), max_size=6))
def test_no_bytes_make_the_reader_fail(lines: list[bytes]) -> None:
    read = rows.parse(lines)
    assert len(read.rows) + len(read.problems) <= len(lines)


def test_reading_and_rendering_import_no_torch() -> None:
    """The supervisor stays small."""
    code = (
        "import sys; from finetune_trainer import manifest;"
        "from finetune_trainer.data import chat_rendering, dataset, preparation, splits, token_cache;"
        "from finetune_trainer.data.batching import batch_plan;"
        "from finetune_trainer.data.reading import rows;"
        "from finetune_trainer.reporting import event_writer;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "operator:trainer_image"})
