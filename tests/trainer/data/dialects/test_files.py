"""Files of further kinds are read, or refused by the name of what they are, with the remedy."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from finetune_trainer.data.reading import rows
from finetune_trainer.errors import RunError

_PAIR = '{"prompt": "a", "completion": "b"}\n'

_BINARY: dict[str, tuple[bytes, str]] = {
    "lz4": (b"\x04\x22\x4d\x18abc", "is compressed with lz4; unpack it"),
    "lzma": (lzma.compress(_PAIR.encode(), format=lzma.FORMAT_ALONE), "is compressed with lzma; unpack it"),
    "snappy": (b"\xff\x06\x00\x00sNaPpYabc", "is compressed with snappy; unpack it"),
    "compressed twice": (gzip.compress(gzip.compress(_PAIR.encode())), "is compressed twice; unpack it once"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c\x00\x04", "is a 7-Zip archive; unpack it"),
    "RAR": (b"Rar!\x1a\x07\x00", "is a RAR archive; unpack it"),
    "a pickle": (b"\x80\x04\x95\x10\x00", "is a pickle, which is never loaded because it may run any code; export"),
    "NumPy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", "is an array of NumPy; export"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file; export"),
    "Avro": (b"Obj\x01\x04\x14", "is an Avro file; export"),
    "ORC": (b"ORC\x08\x03", "is an ORC file; export"),
    "PDF": (b"%PDF-1.7\n", "is a PDF document; export"),
    "an older workbook": (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "is a document of an older Microsoft Office; save it as",
    ),
    "XML": (b'<?xml version="1.0"?><rows/>', "is XML; export"),
    "an unknown kind": (b"\x0b\x02\x80\x01\x02abc\x05\x06", "is a binary file of an unknown kind; export"),
}


@pytest.mark.parametrize(("content", "message"), _BINARY.values(), ids=_BINARY)
@pytest.mark.parametrize("name", ["rows.bin", "rows.jsonl"])
def test_a_file_that_isnt_text_is_named(content: bytes, message: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError) as refused:
        rows.read(tmp_path / name)
    assert refused.value.message.startswith(f"dataset.uri: the file {message}")


_TEXTS = {
    "ja": "こんにちは世界。これは日本語のテストです。東京は日本の首都であり、世界最大の都市の一つです。",
    "ko": "안녕하세요 세계. 이것은 한국어 테스트입니다. 서울은 대한민국의 수도이다.",
    "zh": "人工智能是计算机科学的一个分支,它企图了解智能的实质。",
    "tw": "臺北是中華民國的首都,這是一個測試。人工智慧是電腦科學的一個分支。",
    "ru": "Привет мир! Как дела? Москва является столицей России.",
    "el": "Καλημέρα κόσμε, η Αθήνα είναι η πρωτεύουσα",
    "he": "שלום עולם, ירושלים היא",
}


@pytest.mark.parametrize(
    ("language", "encoding", "named"),
    [
        ("ja", "shift_jis", "SHIFT_JIS"), ("ja", "euc-jp", "EUC-JP"), ("ko", "euc-kr", "EUC-KR"),
        ("zh", "gbk", "GB18030"), ("tw", "big5", "BIG5"), ("ru", "cp1251", ""), ("ru", "koi8-r", ""),
        ("el", "cp1253", ""), ("he", "cp1255", ""),
    ],
)  # fmt: skip
def test_an_encoding_is_named_only_if_it_is_likely(language: str, encoding: str, named: str) -> None:
    """Whoever follows a wrong name trains on other characters."""
    line = f'{{"prompt": "a", "completion": "{_TEXTS[language]}"}}'.encode(encoding)
    (problem,) = rows.parse([line]).problems
    expected = f"it looks like {named}: save it as UTF-8" if named else "; save it as UTF-8 with the program that wrote"
    assert expected in problem.message
    assert ("iconv" in problem.message) == bool(named)


_JSON: dict[str, str] = {
    "columns as lists": json.dumps({"prompt": ["a", "c"], "completion": ["b", "d"]}),
    "the Hub's viewer": json.dumps({"features": [{"feature_idx": 0, "name": "prompt"}], "rows": [
        {"row_idx": i, "row": row, "truncated_cells": []}
        for i, row in enumerate([{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])]}),
}  # fmt: skip


@pytest.mark.parametrize("content", _JSON.values(), ids=_JSON)
def test_rows_inside_an_object_are_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert [row.turns[-1].content for row in rows.read(tmp_path / "a.json").rows] == ["b", "d"]


def test_a_row_of_lists_isnt_columns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.json").write_text(json.dumps({"messages": turns, "tags": ["x", "y"]}))
    (row,) = rows.read(tmp_path / "a.json").rows
    assert [turn.content for turn in row.turns] == ["a", "b"]


def test_splits_in_one_file_are_refused_instead_of_left_out(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    (tmp_path / "a.json").write_text(json.dumps({"train": [row], "validation": [row]}))
    with pytest.raises(RunError, match="several lists of rows \\(train, validation\\); write each of them"):
        rows.read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,completion\ra,b\rc,d\r", "its lines end with a carriage return; save it with line feeds"),
        (b'prompt,completion\n"say \\"hi\\"",b\n', "written with a backslash? Write two quotes for one inside a field"),
    ],
    ids=["carriage returns", "a backslash"],
)
def test_a_broken_csv_file_has_the_remedy(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(RunError) as refused:
        rows.read(tmp_path / "a.csv")
    assert message in refused.value.message


def test_a_column_without_a_name_is_counted_unless_it_numbers_the_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",prompt,completion,\n0,a,b,note\n")
    (row,) = rows.read(tmp_path / "a.csv").rows
    assert row.unread == (("KeysNotRead", "column 4", 1),)
