"""Files are read as other tools write them, or refused with what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc

from finetune_trainer.data.reading import records, rows
from finetune_trainer.errors import RunError

_ROWS = [{"prompt": "What is a pier?", "completion": "A platform."}, {"prompt": "A quay?", "completion": "A wharf."}]
_COLUMNS = {key: {str(number): row[key] for number, row in enumerate(_ROWS)} for key in _ROWS[0]}


def _read(folder: Path, content: bytes, name: str) -> rows.Rows:
    path = folder / name
    path.write_bytes(content)
    return rows.read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "rows"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param("\n".join(map(json.dumps, _ROWS)), id="lines"),
        pytest.param(json.dumps(_ROWS), id="an array"),
        pytest.param(json.dumps(_ROWS, indent=1), id="an array over several lines"),
        pytest.param("\n".join(json.dumps(row, indent=2) for row in _ROWS), id="objects over several lines"),
        pytest.param("".join(map(json.dumps, _ROWS)), id="objects without a line break"),
        pytest.param(json.dumps({"data": _ROWS}, indent=1), id="a list in an object"),
        pytest.param(json.dumps(_COLUMNS, indent=1), id="columns"),
        pytest.param(
            json.dumps(
                {"columns": list(_ROWS[0]), "index": [0, 1], "data": [list(r.values()) for r in _ROWS]}, indent=1
            ),
            id="columns and data",
        ),
    ],
)
def test_json_is_read_however_it_is_laid_out(content: str, name: str, tmp_path: Path) -> None:
    read = _read(tmp_path, content.encode(), name)
    assert read.problems == ()
    assert [row.turns[-1].content for row in read.rows] == ["A platform.", "A wharf."]


def test_one_broken_line_doesnt_change_how_a_file_is_read(tmp_path: Path) -> None:
    lines = [b'{"prompt": "torn', json.dumps(_ROWS[0]).encode()]
    read = _read(tmp_path, b"\n".join(lines), "a.jsonl")
    assert [row.number for row in read.rows] == [2]
    assert [problem.number for problem in read.problems] == [1]


@pytest.mark.parametrize("as_stream", [True, False])
def test_arrow_files_of_datasets_are_read(as_stream: bool, tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(_ROWS)
    path = tmp_path / "data-00000-of-00001.arrow"
    with (ipc.new_stream if as_stream else ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table)
    assert [row.turns[-1].content for row in rows.read(path).rows] == ["A platform.", "A wharf."]
    torn = tmp_path / "torn.arrow"
    torn.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RunError, match="Arrow file can't be read"):
        rows.read(torn)


def test_a_folder_of_save_to_disk_has_only_its_rows() -> None:
    names = ["data-00000-of-00001.arrow", "state.json", "dataset_info.json", "dataset_dict.json", "cache-1f.arrow"]
    assert [name for name in names if records.is_named_as_data(f"train/{name}")] == names[:1]


@pytest.mark.parametrize(
    ("encoding", "named"),
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32"),
     ("cp1252", "WINDOWS-1252"), ("gb18030", "GB18030")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_another_encoding_is_named_with_the_remedy(encoding: str, named: str, name: str, tmp_path: Path) -> None:
    answer = "北京是中国的首都" if encoding == "gb18030" else "Das Café schließt um zwölf."
    text = json.dumps({"prompt": "a?", "completion": answer}, ensure_ascii=False) + "\n"
    text = {"a.csv": f"prompt,completion\na?,{answer}\n", "a.json": f"[{text}]"}.get(name, text)
    try:
        (problem,) = _read(tmp_path, text.encode(encoding), name).problems
        message = problem.message
    except RunError as error:
        message = error.message
    assert f"iconv -f {named} -t UTF-8" in message


def test_the_separator_line_of_excel_is_understood(tmp_path: Path) -> None:
    read = _read(tmp_path, b"sep=;\r\nprompt;completion\r\na, b?;c\r\n", "a.csv")
    assert [(row.number, row.turns[0].content) for row in read.rows] == [(3, "a, b?")]


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ({"prompt": "2+2?", "completion": 4}, "4"),
        ({"prompt": "is it?", "completion": True}, "true"),
        ({"prompt": "half?", "completion": 0.5}, "0.5"),
        ({"messages": json.dumps([{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}])}, "b"),
        ({"conversations": json.dumps([{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}])}, "b"),
        ({"messages": None, "prompt": "a?", "completion": "b"}, "b"),
        ({"messages": [{"role": "User", "content": "a?"}, {"from": "gpt", "value": "b", "content": None}]}, "b"),
    ],
)
def test_values_are_read_as_they_are_meant(value: Any, answer: str) -> None:
    read = rows.parse([json.dumps(value).encode()])
    assert read.problems == ()
    assert read.rows[0].turns[-1].content == answer


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": "a?", "response": "b"}, "completion is missing (it has prompt, response); map one in "
                                            "dataset.columns.completion"),
        ({"prompt": "a?", "completion": float("nan")}, "completion is missing"),
        ({"messages": "[{'role': 'user'}]"}, "a text that isn't a JSON list"),
        ({"prompt": "a?", "completion": {"x": 1}}, "completion is {'x': 1}, which isn't text"),
    ],
)  # fmt: skip
def test_a_message_has_the_value_the_keys_and_the_remedy(value: Any, message: str) -> None:
    (problem,) = rows.parse([json.dumps(value).encode()]).problems
    assert message in problem.message
