"""Preference rows are read in the shapes of the tools that write them, and KTO rows are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_trainer.data.reading import rows

_USER = {"role": "user", "content": "sky?"}
_BLUE = {"role": "assistant", "content": "blue"}
_GREEN = {"role": "assistant", "content": "green"}
_HUMAN = {"from": "human", "value": "sky?"}
_GPT_BLUE = {"from": "gpt", "value": "blue"}
_GPT_GREEN = {"from": "gpt", "value": "green"}
_HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: sky?\n\nAssistant:"

_SHAPES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("explicit", {"prompt": "sky?", "chosen": "blue", "rejected": "green"}, "u", []),
    ("implicit dialogues", {"chosen": [_USER, _BLUE], "rejected": [_USER, _GREEN]}, "u", []),
    ("JSON text", {"chosen": json.dumps([_USER, _BLUE]), "rejected": json.dumps([_USER, _GREEN])}, "u", []),
    ("one turn each", {"prompt": [_USER], "chosen": _BLUE, "rejected": _GREEN}, "u", []),
    ("hh-rlhf", {"chosen": f"{_HH} blue", "rejected": f"{_HH} green"}, "uau", []),
    ("hh-rlhf with a prompt", {"prompt": _HH, "chosen": "blue", "rejected": "green"}, "uau", []),
    ("UltraFeedback", {"prompt": "sky?", "messages": [_USER, _BLUE], "chosen": [_USER, _BLUE],
                       "rejected": [_USER, _GREEN], "score_chosen": 8.5}, "u", ["messages", "score_chosen"]),
    ("Orca", {"system": "s", "question": "sky?", "chosen": "blue", "rejected": "green"}, "su", []),
    ("Orca of Argilla", {"system": "s", "input": "sky?", "chosen": "blue", "rejected": "green", "rating": [5, 1]}, "su",
     ["rating"]),
    ("Argilla", {"instruction": "sky?", "chosen_response": "blue", "rejected_response": "green"}, "u", []),
    ("LLaMA-Factory, alpaca", {"instruction": "sky?", "input": "", "chosen": "blue", "rejected": "green"}, "u", []),
    ("LLaMA-Factory with a history", {"instruction": "sky?", "history": [["hi", "hello"]], "chosen": "blue",
                                      "rejected": "green"}, "uau", []),
    ("LLaMA-Factory, sharegpt", {"conversations": [_HUMAN], "chosen": _GPT_BLUE, "rejected": _GPT_GREEN}, "u", []),
    ("ShareGPT pairs", {"chosen": [_HUMAN, _GPT_BLUE], "rejected": [_HUMAN, _GPT_GREEN]}, "u", []),
    ("OpenAI", {"input": {"messages": [_USER], "tools": []}, "preferred_output": [_BLUE],
                "non_preferred_output": [_GREEN]}, "u", []),
    ("ms-swift", {"messages": [_USER, _BLUE], "rejected_response": "green"}, "u", []),
    ("SHP, the first is better", {"history": "sky?", "human_ref_A": "blue", "human_ref_B": "green", "labels": 1}, "u",
     []),
    ("SHP, the second is better", {"history": "sky?", "human_ref_A": "green", "human_ref_B": "blue", "labels": 0}, "u",
     []),
]  # fmt: skip


@pytest.mark.parametrize(("value", "roles", "unread"), [pytest.param(*rest, id=id) for id, *rest in _SHAPES])
def test_a_pair_is_read_in_the_shape_of_any_tool(value: dict[str, Any], roles: str, unread: list[str]) -> None:
    read = rows.parse([json.dumps(value).encode()], "preference")
    assert read.problems == ()
    (row,) = read.rows
    for turns, answer in ((row.turns, "blue"), (row.rejected, "green")):
        assert "".join(turn.role[0] for turn in turns) == f"{roles}a"
        assert turns[-2].content == "sky?"
        assert turns[-1].content.strip() == answer
    assert [subject for _, subject, _ in row.unread] == unread


def test_texts_without_a_prompt_have_their_common_beginning_as_the_prompt() -> None:
    (row,) = rows.parse([b'{"chosen": "The sky is blue.", "rejected": "The sky is bleak."}'], "preference").rows
    assert [turn.content for turn in (*row.turns, row.rejected[-1])] == ["The sky is", "blue.", "bleak."]


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize(("format", "value"), [("preference", True), ("auto", False)])
def test_a_row_for_kto_is_refused_by_name(key: str, format: str, value: bool) -> None:
    row = {"prompt": "sky?", "completion": "blue", key: value}
    (problem,) = rows.parse([json.dumps(row).encode()], format).problems
    assert "KTO" in problem.message
