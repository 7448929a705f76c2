"""Files of rows: every file format and compression gives the same rows, and what can't be read is
reported by row number."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from finetune_trainer.data.reading import records, rows
from finetune_trainer.data.reading.row import Problem, Row
from finetune_trainer.errors import RunError

_PAIRS = [{"prompt": f"question, {i}", "completion": f'say "{i}"\nand more é'} for i in range(5)]


def _json_lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _csv(values: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(values[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue().encode()


def _parquet(values: list[dict[str, Any]], **options: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(values), sink, **options)
    return sink.getvalue()


def _zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)  # type: ignore[no-any-return]


_FILE_FORMATS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = {
    "json lines": ("a.jsonl", _json_lines),
    "json": ("a.json", lambda values: json.dumps(values, indent=1).encode()),
    "json by another name": ("rows", lambda values: b"\xef\xbb\xbf" + json.dumps(values).encode()),
    "csv": ("a.csv", _csv),
    "csv with semicolons": ("rows", lambda values: _csv(values, ";")),
    "parquet": ("a.parquet", _parquet),
    "gzip": ("a.jsonl.gz", lambda values: gzip.compress(_json_lines(values))),
    "two gzip members": ("a.gz", lambda v: gzip.compress(_json_lines(v[:2])) + gzip.compress(_json_lines(v[2:]))),
    "bz2": ("a.csv.bz2", lambda values: bz2.compress(_csv(values))),
    "xz": ("a.json.xz", lambda values: lzma.compress(json.dumps(values).encode())),
    "two xz streams": ("a.xz", lambda v: lzma.compress(_json_lines(v[:2])) + lzma.compress(_json_lines(v[2:]))),
    "zstd": ("a.jsonl.zst", lambda values: _zstd(_json_lines(values))),
}


def _read(folder: Path, data: bytes, name: str = "a.jsonl", format: str = "auto") -> rows.Rows:
    path = folder / name
    path.write_bytes(data)
    return rows.read(path, format)


@pytest.mark.parametrize("how", _FILE_FORMATS)
def test_every_file_format_gives_the_same_rows(how: str, tmp_path: Path) -> None:
    name, write = _FILE_FORMATS[how]
    read = _read(tmp_path, write(_PAIRS), name)
    assert read.format == "prompt-completion"
    assert [(row.turns[0].content, row.turns[1].content) for row in read.rows] == [
        (pair["prompt"], pair["completion"]) for pair in _PAIRS
    ]
    assert read.problems == ()


def test_numbers_are_lines_in_csv_and_positions_in_other_formats(tmp_path: Path) -> None:
    """A CSV record of two lines has the number of its first line, as an editor shows it."""
    assert [row.number for row in _read(tmp_path, _csv(_PAIRS), "a.csv").rows] == [2, 4, 6, 8, 10]
    assert [row.number for row in _read(tmp_path, _parquet(_PAIRS), "b").rows] == [1, 2, 3, 4, 5]
    array = json.dumps([_PAIRS[0], 7, {"prompt": "x"}, _PAIRS[1]]).encode()
    read = _read(tmp_path, array, "c.json")
    assert [row.number for row in read.rows] == [1, 4]
    assert [str(problem) for problem in read.problems] == [
        "row 2: is 7, which isn't a JSON object; write an object with keys such as prompt and completion",
        "row 3: completion is missing (it has prompt); map one in dataset.columns.completion",
    ]


_LONG = b'{"prompt": "' + b"x" * (records.MAX_RECORD_BYTES + 5) + b'", "completion": "y"}\n'


def test_a_line_that_is_too_long_is_reported_and_the_next_one_is_read(tmp_path: Path) -> None:
    good = _json_lines(_PAIRS[:1])
    read = _read(tmp_path, good + _LONG + good + _LONG.rstrip(b"\n"))
    assert [row.number for row in read.rows] == [1, 3]
    assert [problem.number for problem in read.problems] == [2, 4]
    assert "more than 16 MiB" in read.problems[0].message


_BROKEN: list[tuple[str, str, Any, str]] = [
    ("a torn gzip", "a.gz", lambda: gzip.compress(_json_lines(_PAIRS) * 900)[:-20], "gzip data can't be unpacked"),
    ("a bad zstd", "a.zst", lambda: _zstd(_json_lines(_PAIRS * 500))[:200] + b"x" * 50, "zstd data can't be unpacked"),
    ("a torn xz", "a.xz", lambda: lzma.compress(_json_lines(_PAIRS * 500))[:-40], "xz data can't be unpacked"),
    ("a torn array", "a.json", lambda: json.dumps(_PAIRS).encode()[:-4], "row 5: isn't JSON"),
    ("an array without end", "a.json", lambda: json.dumps(_PAIRS).encode()[:-1], "row 6: the file ends inside"),
    ("two arrays", "a.json", lambda: json.dumps(_PAIRS).encode() * 2, "something after the end of the array"),
    ("no comma", "a.json", lambda: b'[{"text": "a"} {"text": "b"}]', "row 2: isn't JSON (a comma is missing"),
    ("an open quote", "a.csv", lambda: b'prompt,completion\na,b\nc,"d\n' + b"e,f\n" * 9, "row 3: isn't CSV"),
    ("utf-16", "a.csv", lambda: "prompt,completion\na,b\n".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
    ("latin-1", "a.csv", lambda: b"prompt,completion\na,\xe9\n", "row 2: isn't UTF-8 (byte 2)"),
    ("a column twice", "a.csv", lambda: b"text,text\na,b\n", "names the column 'text' twice"),
    ("a torn parquet", "a.parquet", lambda: _parquet(_PAIRS)[:-9], "parquet file can't be read"),
    ("parquet in gzip", "a.gz", lambda: gzip.compress(_parquet(_PAIRS)), "parquet inside a compressed file"),
    ("an archive", "a.zip", lambda: b"PK\x03\x04rest", "is an archive of several files"),
    ("a giant cell", "a.parquet", lambda: _parquet([{"text": "x" * (17 << 20)}]), "(rows 1 to 1), column text"),
    ("a giant field", "a.csv", lambda: b"text\n" + b"x" * (17 << 20), "row 2: a record has more than 16 MiB"),
    ("lines without end in a quote", "a.csv", lambda: b'text\n"' + b"x\n" * (9 << 20), "a record has more than 16 MiB"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "message"), [pytest.param(*rest, id=id) for id, *rest in _BROKEN])
def test_a_file_that_cant_be_read_to_its_end_is_rejected_with_any_on_invalid(
    name: str, make: Callable[[], bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError) as error:
        _read(tmp_path, make(), name)
    assert error.value.reason == "DatasetInvalid"
    assert message in error.value.message


def test_one_giant_value_that_many_parquet_rows_refer_to_is_reported_by_row(tmp_path: Path) -> None:
    """A dictionary entry of 20 MiB that 2,000 rows refer to would be 40 GB as texts."""
    values = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0, 1, *[1] * 1998], pyarrow.int32()), ["ok", "x" * (20 << 20)]
    )
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"text": values.cast(pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))}), path
    )
    read = rows.read(path)
    assert [row.number for row in read.rows] == [1]
    assert [problem.number for problem in read.problems] == list(range(2, 2001))


# A separate Python runs this, so that its memory can be limited. It prints a file's row numbers and
# problems, or the error.
_BOUNDED = """
import resource, sys
from pathlib import Path
from finetune_trainer.data.reading import rows
from finetune_trainer.data.reading.row import Problem
from finetune_trainer.errors import RunError
if sys.argv[1].endswith("zst"):
    import pyarrow
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
try:
    stream, _ = rows.stream(rows.InputFile(Path(sys.argv[1])), "dataset.uri")
    print([str(row) if isinstance(row, Problem) else row.number for row in stream])
except RunError as error:
    print(error.message)
"""


@pytest.mark.parametrize("kind", ["a line of 600 MB", "a bomb of one line", "a bomb of many lines"])
def test_data_that_would_fill_the_memory_is_reported_instead(kind: str, tmp_path: Path) -> None:
    path, limit = tmp_path / "rows.jsonl", 400 << 20
    good = _json_lines(_PAIRS[:1])
    if kind == "a line of 600 MB":
        expected = "[1, 'row 2: a line has more than 16 MiB"
        with path.open("wb") as file:
            file.write(good)
            file.truncate(600 << 20)  # zero bytes that use no disk
    elif kind == "a bomb of one line":
        expected = "row 2: the xz data expands to more than 256 MiB from"
        path.write_bytes(lzma.compress(good, preset=0) + lzma.compress(b" " * (30 << 20), preset=0) * 10)
    else:
        expected = "the zstd data expands to more than 256 MiB from"
        path, limit = path.with_suffix(".zst"), 1600 << 20  # pyarrow itself uses half of it
        path.write_bytes(_zstd(_json_lines([{"text": "x" * (1 << 20)}] * 30)) * 10)
    out = subprocess.run(
        [sys.executable, "-c", _BOUNDED, str(path), str(limit)],
        env={"PYTHONPATH": "operator:trainer_image"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert expected in out.stdout


_TYPED = (
    b"a\xff",
    Decimal("0.5"),
    datetime(2026, 1, 2, tzinfo=UTC),
    timedelta(1),
    ("a", "b"),
    10**400,
    "[0.2 0.8",
    "-1",
)
"""Parquet has more types than JSON."""
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.sampled_from(_TYPED) | st.dictionaries(st.sampled_from(
        ["prompt", "completion", "messages", "role", "content", "from", "value", "conversations", "text", "instruction",
         "input", "output", "history", "system", "tools", "tool_calls", "weight", "data", "annotations", "result",
         "annotation_id", "annotator", "label", "probs", "prob_0", "prob_1", "from_name", "to_name", "choices",
         "function", "arguments", "chosen", "rejected", "preds"]), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip
_COLUMNS = st.dictionaries(
    st.sampled_from(["prompt", "completion", "messages", "role", "content", "probabilities", "text", "tools"]),
    st.sampled_from(["label", "probs", "text", "messages", "from", "value", "input", "data", "nothing"]), max_size=3,
)  # fmt: skip


@given(st.lists(_JSON, max_size=4), st.sampled_from(rows.FORMATS), st.just({}) | _COLUMNS)
@settings(max_examples=600, deadline=None)
def test_no_value_makes_a_reader_fail_and_none_is_lost(values: list[Any], format: str, columns: dict[str, str]) -> None:
    stream = rows.Stream(
        ((number, value if isinstance(value, dict) else "no object") for number, value in enumerate(values, 1)),
        rows.InputFile(Path(), format=format, columns=columns, labels=("a", "b"), min_label_probability=0.6),
    )
    assert [row.number for row in stream] == list(range(1, len(values) + 1))


@given(st.binary(max_size=200), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.gz", "rows", "a.parquet"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_rejected_as_an_invalid_dataset(data: bytes, name: str) -> None:
    read = _read_or_none(data, name)
    assert read is None or len(read.rows) + len(read.problems) <= len(data)


def _read_or_none(data: bytes, name: str) -> rows.Rows | None:
    """Returns the rows, or None if the file is rejected as invalid. Any other exception is
    raised."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            return rows.read(path)
        except RunError as error:
            assert error.reason == "DatasetInvalid"  # noqa: PT017
            return None


def _is_json_lines(data: bytes) -> bool:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(data)
        return not data.startswith(b"\x1f\x8b") and records.file_format(path, path.name) == "jsonl"


_FRAGMENTS = st.sampled_from([
    b'{"prompt": "a", "completion": "b"}', b'{"text": "\\ud800"}', b"[", b"]", b",", b'"', b"\n", b"\n\n", b"{", b"}",
    b"a,b", b"\xff", b"\xef\xbb\xbf", b"prompt,completion\n", b"text;label\n", b"\r\n", b"\x00", b" ", b'{"text": NaN}',
    b'{"text": "a", "text": "b"}', b"\x1f\x8b", b"7", b"PAR1", b"[" * 3000,
])  # fmt: skip


@given(st.lists(_FRAGMENTS, max_size=12).map(b"".join), st.sampled_from(["a.jsonl", "a.json", "a.csv", "rows"]))
@settings(max_examples=400, deadline=None)
def test_a_file_of_random_fragments_is_read_or_rejected_and_no_line_is_lost(data: bytes, name: str) -> None:
    read = _read_or_none(data, name)
    if read is None:
        return
    assert all(problem.message for problem in read.problems)
    if name == "a.jsonl" and _is_json_lines(data):
        numbers = [number for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
        assert sorted([*(row.number for row in read.rows), *(problem.number for problem in read.problems)]) == numbers


def _row(value: Any, format: str = "auto", **more: Any) -> Row | Problem:
    (row,) = rows.Stream([(1, value)], rows.InputFile(Path(), format=format, **more))
    return row


def _turns(value: Any, **more: Any) -> list[tuple[str, str]]:
    row = _row(value, **more)
    assert isinstance(row, Row), row
    return [(turn.role, turn.content) for turn in row.turns]


def _pair(question: str, answer: str) -> list[tuple[str, str]]:
    return [("user", question), ("assistant", answer)]


def _annotation(text: str, date: str) -> dict[str, Any]:
    result = {"from_name": "answer", "to_name": "question", "type": "textarea", "value": {"text": [text]}}
    return {"result": [result], "updated_at": date}


_HAM = {"labels": ("ham", "spam")}
_STUDIO = {"id": "1", "annotation_id": "2", "annotator": "3", "lead_time": "1"}
_TASK = {
    "id": 7, "data": {"question": "Why?", "source": "a.txt"},
    "annotations": [_annotation("So.", "2026-01-01"), _annotation("Because.", "2026-01-02")],
}  # fmt: skip
_ROW_FORMATS: list[tuple[str, Any, dict[str, Any], list[tuple[str, str]]]] = [
    ("text", {"text": "All."}, {}, [("text", "All.")]),
    ("alpaca", {"instruction": "Sum.", "input": "1 2", "output": "3"}, {}, _pair("Sum.\n\n1 2", "3")),
    ("alpaca without input", {"instruction": "Hi.", "input": "", "output": "Yo"}, {}, _pair("Hi.", "Yo")),
    ("alpaca with history", {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}, {},
     [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}, {},
     [("system", "s"), ("user", "a"), ("assistant", "b")]),
    ("conversational prompt",
     {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
     {}, _pair("a", "b")),
    ("content parts", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                                    {"role": "assistant", "content": "b"}]}, {}, _pair("a", "b")),
    ("columns", {"q": "a", "a": "b"}, {"columns": {"prompt": "q", "completion": "a"}}, _pair("a", "b")),
    ("columns of turns", {"chat": [{"who": "user", "text": "a"}, {"who": "assistant", "text": "b"}]},
     {"columns": {"messages": "chat", "role": "who", "content": "text"}}, _pair("a", "b")),
    ("label studio, newest annotation", _TASK, {}, _pair("Why?", "Because.")),
    ("label studio, json-min", {**_STUDIO, "text": "nice", "mood": "good"}, {},
     _pair("nice", "good")),
    ("label studio, csv of choices", {**_STUDIO, "text": "nice", "mood": '{"choices": ["good", "short"]}'}, {},
     _pair("nice", "good, short")),
    ("snorkel word", {"text": "win!", "label": "spam"}, {}, _pair("win!", "spam")),
    ("snorkel number", {"text": "win!", "preds": "1"}, _HAM, _pair("win!", "spam")),
    ("snorkel probabilities", {"text": "win!", "probs": [0.2, 0.8]}, _HAM,
     _pair("win!", "spam")),
    ("snorkel printed probabilities", {"text": "win!", "probs": "[0.9 0.1]"}, _HAM,
     _pair("win!", "ham")),
    ("snorkel columns of probabilities", {"text": "win!", "prob_0": "0.1", "prob_1": "0.9"}, _HAM,
     _pair("win!", "spam")),
]  # fmt: skip


@pytest.mark.parametrize(("value", "more", "turns"), [pytest.param(*rest, id=id) for id, *rest in _ROW_FORMATS])
def test_a_record_of_each_format_is_recognized(value: Any, more: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    assert _turns(value, **more) == turns


def test_only_the_completion_of_a_conversational_prompt_is_trained_on() -> None:
    row = _row({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                           {"role": "user", "content": "c"}],
                "completion": [{"role": "assistant", "content": "d"}]})  # fmt: skip
    assert isinstance(row, Row)
    assert [turn.in_loss for turn in row.turns] == [False, False, False, True]


def test_a_turn_of_weight_0_isnt_trained_on_and_tool_calls_are_preserved() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = _row({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
                             {"role": "user", "content": "c"},
                             {"role": "assistant", "content": None, "tool_calls": [call]}],
                "tools": '[{"name": "add"}]'})  # fmt: skip
    assert isinstance(row, Row)
    assert [turn.in_loss for turn in row.turns] == [True, False, True, True]
    assert json.loads(row.turns[-1].more)["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert json.loads(row.tools) == [{"type": "function", "function": {"name": "add"}}]


_REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("nothing known", {"a": 1}, {}, "its keys: a); map its keys in dataset.columns"),
    ("image",
     {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {}, "content[0] is of type 'image_url'"),
    ("an unknown role", {"conversations": [{"from": "dog", "value": "w"}]}, {}, "conversations[0].from is 'dog'"),
    ("weight", {"messages": [{"role": "user", "content": "a", "weight": 0.5}]}, {}, "weight is 0.5"),
    ("nothing to train on",
     {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
     {}, "there is nothing to train on"),
    ("a column that isn't there", {"prompt": "a", "completion": "b"}, {"columns": {"prompt": "q"}}, "q is missing"),
    ("not labelled", {**_TASK, "annotations": []}, {}, "has no annotation"),
    ("two answers", {"data": {"text": "a"}, "annotations": [{"result": [
        {"from_name": "x", "value": {"text": ["1"]}}, {"from_name": "y", "value": {"text": ["2"]}}]}]}, {},
     "is annotated with x, y; name the answer in dataset.columns.completion"),
    ("spans",
     {"data": {"text": "a"}, "annotations": [{"result": [{"from_name": "x", "value": {"labels": ["P"], "start": 0}}]}]},
     {}, "is none of the regions of a text with a place (start, end) and labels; use a TextArea or Choices"),
    ("abstains", {"text": "a", "label": -1}, {"labels": ("x", "y")}, "-1: every labeling function abstains"),
    ("a tie", {"text": "a", "probs": [0.5, 0.5]}, {"labels": ("x", "y")}, "equally probable"),
    ("no class names", {"text": "a", "label": 1}, {}, "name the classes in dataset.labels"),
    ("too few names", {"text": "a", "label": 2}, {"labels": ("x", "y")}, "is of class 2, but dataset.labels names 2"),
    ("no probability", {"text": "a", "probs": [0.5, 7]}, {"labels": ("x", "y")}, "must be numbers from 0 to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "more", "message"), [pytest.param(*rest, id=id) for id, *rest in _REFUSED])
def test_a_row_that_cant_be_trained_on_is_reported_by_key(value: Any, more: dict[str, Any], message: str) -> None:
    row = _row(value, **more)
    assert isinstance(row, Problem), row
    assert message in row.message
