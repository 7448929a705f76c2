"""What people labeled in a text with Prodigy, Doccano, spaCy or Argilla is the answer, and doesn't
vanish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from finetune_trainer.data.reading import rows

_ALICE = [{"text": "Alice", "labels": ["PER"], "start": 0, "end": 5}]
_SPAN = {"start": 0, "end": 5, "label": "PER"}
_OPTIONS = [{"id": "a", "text": "good"}, {"id": "b", "text": "bad"}]

_SPANS: dict[str, dict[str, Any]] = {
    "Prodigy": {"spans": [_SPAN], "tokens": [{"text": "Alice", "start": 0, "end": 5}], "answer": "accept"},
    "Doccano": {"label": [[0, 5, "PER"]]},
    "Doccano with relations": {"entities": [{"id": 7, "label": "PER", "start_offset": 0, "end_offset": 5}],
                               "relations": []},
    "spaCy": {"ents": [_SPAN]},
    "spaCy's older format": {"entities": [[0, 5, "PER"]]},
    "Argilla": {"annotation": [["PER", 0, 5]], "status": "Validated"},
}  # fmt: skip


def _read(*records: dict[str, Any]) -> rows.Rows:
    return rows.parse([json.dumps(record).encode() for record in records])


@pytest.mark.parametrize("labeled", _SPANS.values(), ids=_SPANS)
def test_labeled_parts_of_a_text_are_the_answer_as_json(labeled: dict[str, Any]) -> None:
    read = _read({"text": "Alice sings.", **labeled})
    assert read.problems == ()
    question, answer = read.rows[0].turns
    assert question.content == "Alice sings."
    assert json.loads(answer.content) == _ALICE
    assert {subject for _, subject, _ in read.rows[0].unread} <= {"tokens"}


def test_relations_of_doccano_are_part_of_the_answer() -> None:
    entities = [{"id": 7, "label": "PER", "start_offset": 0, "end_offset": 5},
                {"id": 9, "label": "LOC", "start_offset": 15, "end_offset": 19}]  # fmt: skip
    relations = [{"id": 1, "from_id": 7, "to_id": 9, "type": "lives in"}]
    (row,) = _read({"text": "Alice lives in Oslo.", "entities": entities, "relations": relations}).rows
    answer = json.loads(row.turns[1].content)
    assert answer["relations"] == [{"from": 1, "to": 2, "labels": ["lives in"]}]


_ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "a choice of Prodigy": ({"options": _OPTIONS, "accept": ["a"], "answer": "accept"}, "good"),
    "two choices of Prodigy": ({"options": _OPTIONS, "accept": ["a", "b"], "answer": "accept"}, "good, bad"),
    "a text of Prodigy": ({"user_input": "bonjour", "_task_hash": 1, "answer": "accept"}, "bonjour"),
    "no part of a text": ({"tokens": [], "answer": "accept"}, "[]"),
    "no entity": ({"entities": []}, "[]"),
    "a list of one label": ({"label": ["bonjour"]}, "bonjour"),
    "a list of labels": ({"labels": ["good", "new"]}, "good, new"),
    "Argilla": ({"annotation": "good", "prediction": None, "status": "Validated"}, "good"),
}


@pytest.mark.parametrize(("labeled", "answer"), _ANSWERS.values(), ids=_ANSWERS)
def test_what_was_chosen_or_written_is_the_answer(labeled: dict[str, Any], answer: str) -> None:
    read = _read({"text": "hello", **labeled})
    assert read.problems == ()
    assert [turn.content for turn in read.rows[0].turns] == ["hello", answer]


_UNLABELED: dict[str, dict[str, Any]] = {
    "rejected parts": {"text": "Alice", "spans": [_SPAN], "answer": "reject"},
    "ignored choices": {"text": "x", "options": _OPTIONS, "accept": [], "answer": "ignore"},
    "no choice": {"text": "x", "options": _OPTIONS, "accept": [], "answer": "accept"},
    "an empty list": {"text": "x", "label": []},
    "a null": {"text": "x", "label": None},
    "nothing in Label Studio": {"data": {"text": "x"}, "annotations": [{"result": []}]},
}


@pytest.mark.parametrize("record", _UNLABELED.values(), ids=_UNLABELED)
def test_a_row_without_a_label_is_passed_over_and_counted(record: dict[str, Any]) -> None:
    read = _read(record, {"text": "x", "label": "good"} if "label" in record else record)
    assert all(problem.unlabelled for problem in read.problems)
    assert [row.turns[-1].content for row in read.rows] == (["good"] if "label" in record else [])


def test_a_first_row_without_a_label_doesnt_make_the_others_documents(tmp_path: Path) -> None:
    columns = {"text": ["a", "b"], "label": pa.array([None, "good"], pa.string())}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    read = rows.read(tmp_path / "a.parquet")
    assert read.format == "snorkel"
    assert [[turn.content for turn in row.turns] for row in read.rows] == [["b", "good"]]


def test_texts_with_labels_are_documents_if_the_job_says_so() -> None:
    read = rows.parse([json.dumps({"text": "Alice", "spans": [_SPAN], "answer": "accept"}).encode()], "text")
    assert [turn.content for turn in read.rows[0].turns] == ["Alice"]
    assert ("KeysNotRead", "spans", 1) in read.rows[0].unread


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "Alice", "entities": [[0, 50, "PER"]]}, "the region 0 to 50 isn't in its text"),
        ({"text": "Alice", "spans": [{"start": 0}], "answer": "accept"}, "spans has an entry without a start, an end"),
        ({"prompt": "a", "completion": "b", "status": "discarded"}, "status is 'discarded', which marks the row as un"),
    ],
    ids=["beyond the text", "no end", "discarded"],
)
def test_a_label_that_cant_be_meant_is_refused(record: dict[str, Any], message: str) -> None:
    (problem,) = _read(record).problems
    assert message in problem.message
    assert not problem.unlabelled


def test_a_pair_with_other_dialogues_beside_it_has_its_own_prompt() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = [turns[0], {"role": "assistant", "content": "b"}]
    record = {"conversation": [{"input": "q", "output": ""}], "chosen": turns, "rejected": other}
    (row,) = rows.parse([json.dumps(record).encode()], "preference").rows
    assert [turn.content for turn in (*row.turns, row.rejected[-1])] == ["q", "a", "b"]
    assert row.unread == (("KeysNotRead", "conversation", 1),)
