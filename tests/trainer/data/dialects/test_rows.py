"""Rows in further shapes: read as they are meant, counted if something is lost or looks wrong, or
refused with the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from finetune_api.spec.rendering import RenderingSpec
from finetune_trainer.data.example import Example
from finetune_trainer.data.reading import dialogues, rows
from finetune_trainer.data.reading.row import Row
from templates.families import FAMILIES, Family
from templates.page import renderer

_USER = {"role": "user", "content": "sky?"}
_BLUE = {"role": "assistant", "content": "blue"}
_FAMILIES = {family.name: family for family in FAMILIES}


def _row(record: dict[str, Any], format: str = "auto") -> Row:
    read = rows.parse([json.dumps(record).encode()], format)
    assert read.problems == ()
    return read.rows[0]


def _answer(content: str, **keys: Any) -> dict[str, Any]:
    return {"messages": [_USER, {"role": "assistant", "content": content, **keys}]}


_NUMBERS = [
    ("1.10", "1.10"), ("1e5", "1e5"), ("12345678901234567890.5", "12345678901234567890.5"), ("-0.50", "-0.50"),
    ("10000000000000000000000001", "10000000000000000000000001"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "answer"), _NUMBERS)
@pytest.mark.parametrize("layout", ['{"prompt": "a?", "completion": %s}', '[{"prompt": "a?", "completion": %s}]'])
def test_a_number_is_the_answer_as_it_is_written(written: str, answer: str, layout: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(layout % written)
    assert rows.read(path).rows[0].turns[-1].content == answer


def test_a_number_of_32_bits_has_the_digits_of_32_bits(tmp_path: Path) -> None:
    columns = {"prompt": ["a?", "b?"], "completion": pa.array([0.1, 2.5], pa.float32())}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert [row.turns[-1].content for row in rows.read(tmp_path / "a.parquet").rows] == ["0.1", "2.5"]


_COUNTED: dict[str, tuple[dict[str, Any], list[tuple[str, str, int]]]] = {
    "reasoning that never ends": (_answer("<think>\nhm, blue"), [("OpenReasoning", "answers", 1)]),
    "reasoning of OpenThoughts": (_answer("<|begin_of_thought|> hm"), [("OpenReasoning", "answers", 1)]),
    "reasoning alone": (_answer("<think>hm</think>\n"), [("ReasoningOnly", "answers", 1)]),
    "reasoning alone, as a key": (_answer("", reasoning_content="hm"), [("ReasoningOnly", "answers", 1)]),
    "reasoning and an answer": (_answer("<think>hm</think>\nblue"), []),
    "reasoning and a call": (_answer("", reasoning_content="hm", tool_calls=[{"function": {"name": "f"}}]), []),
    "characters that were lost": (_answer("caf\ufffd"), [("BrokenText", "texts", 1)]),
    "an answer that nobody sees": (
        {"messages": [_USER, {"role": "assistant", "content": "\u200b\ufeff"}, _USER, _BLUE]},
        [("EmptyAnswers", "answers", 1)],
    ),
    "Axolotl's training": ({"messages": [_USER, {**_BLUE, "training": False}, _USER, _BLUE]}, []),
}  # fmt: skip


@pytest.mark.parametrize(("record", "lost"), _COUNTED.values(), ids=_COUNTED)
def test_what_looks_wrong_is_counted(record: dict[str, Any], lost: list[tuple[str, str, int]]) -> None:
    assert list(_row(record).unread) == lost


def test_a_turn_that_axolotl_doesnt_train_on_isnt_trained_on() -> None:
    row = _row(_COUNTED["Axolotl's training"][0])
    assert [turn.in_loss for turn in row.turns if turn.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("<|begin_of_thought|>hm<|end_of_thought|>\n\nblue", "blue"),
        ("◁think▷hm◁/think▷blue", "blue"),
        ("hm\n</think>\n\nblue", "blue"),
        ("hm</think>\nblue", "blue"),
        ("Write </think> at the end.", "Write </think> at the end."),
        ("Write <think>\nx\n</think>\nso.", "Write <think>\nx\n</think>\nso."),
    ],
)
def test_reasoning_is_recognized_as_models_write_it(content: str, answer: str) -> None:
    row = dialogues.adjusted(_row(_answer(content)), RenderingSpec(reasoning="remove"))
    assert row.turns[-1].content == answer


def test_an_answer_that_begins_within_a_thought_of_its_prompt_keeps_it() -> None:
    """R1's own answers lack the beginning of their thought, which its prompt has."""
    outcome = renderer(_FAMILIES["DeepSeek-R1 (distilled)"]).render(_row(_answer("hm\n</think>\n\nblue")))
    assert isinstance(outcome, Example)
    assert _texts_of(_FAMILIES["DeepSeek-R1 (distilled)"], outcome) == ["hm\n</think>\n\nblue<|end_of_sentence|>"]


def _texts_of(family: Family, outcome: Example) -> list[str]:
    tokenizer = renderer(family).tokenizer
    return [
        str(tokenizer.decode([token for token, in_loss in zip(e.ids, e.loss_mask, strict=True) if in_loss]))
        for e in (*outcome.earlier, outcome)
    ]


@pytest.mark.parametrize(
    "end", ["\n", "{% if not (loop.last and m.role == 'assistant') %}<|im_end|>{% endif %}"], ids=["never", "not last"]
)
def test_every_answer_ends_with_a_stop_token_whatever_the_template_writes(end: str) -> None:
    turn = "{% for m in messages %}{{ m.role + ': ' + m.content }}" + end + "{% endfor %}"
    family = Family("own", "", turn + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    outcome = renderer(family).render(_row({"messages": [_USER, _BLUE, _USER, {**_BLUE, "content": "deep blue"}]}))
    assert isinstance(outcome, Example)
    assert [text.replace("\n", "") for text in _texts_of(family, outcome)] == ["blue<|im_end|>", "deep blue<|im_end|>"]


_MEDIA: dict[str, dict[str, Any]] = {
    "a prompt": {"prompt": "<image>What?", "completion": "A cat.", "images": ["a.png"]},
    "Alpaca": {"instruction": "<image>What?", "output": "A cat.", "images": ["a.png"]},
    "a pair": {"prompt": "<image>What?", "chosen": "A cat.", "rejected": "A dog.", "images": ["a.png"]},
    "another mark": {"prompt": "<|image_1|> What?", "completion": "A cat.", "image": "a.png"},
    "Qwen's mark": {"prompt": "<|image_pad|>What?", "completion": "A cat.", "image": "a.png"},
    "Pixtral's mark": {"messages": [{"role": "user", "content": "[IMG]What?"}, _BLUE], "images": ["a.png"]},
}


@pytest.mark.parametrize("record", _MEDIA.values(), ids=_MEDIA)
def test_a_question_about_an_image_is_refused_in_any_format(record: dict[str, Any]) -> None:
    (problem,) = rows.parse([json.dumps(record).encode()]).problems
    assert "only text can be trained on: remove the row" in problem.message


_PAIRS: dict[str, dict[str, Any]] = {
    "messages and two answers": {"messages": [_USER], "chosen": "blue", "rejected": "green"},
    "a conversation and two answers": {
        "conversation": [_USER], "chosen": _BLUE, "rejected": {"role": "assistant", "content": "green"},
    },
}  # fmt: skip


@pytest.mark.parametrize("record", _PAIRS.values(), ids=_PAIRS)
def test_a_pair_beside_its_dialogue_is_read(record: dict[str, Any]) -> None:
    row = _row(record, "preference")
    assert [turn.content for turn in (*row.turns, row.rejected[-1])] == ["sky?", "blue", "green"]
    assert row.unread == ()


@pytest.mark.parametrize("empty", ["", []])
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_list_of_turns_without_turns_is_an_absent_key(name: str, empty: Any) -> None:
    row = _row({name: empty, "prompt": "sky?", "completion": "blue"})
    assert [turn.content for turn in row.turns] == ["sky?", "blue"]
    (problem,) = rows.parse([json.dumps({name: empty}).encode()]).problems
    assert problem.message.startswith(f"{name} is ")


_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "capital letters": ({"Prompt": "a", "Completion": "b"}, "such as {prompt: Prompt, completion: Completion}"),
    "Gemini's older keys": ({"text_input": "a", "output": "b"}, "such as {prompt: text_input, completion: output}"),
    "PaLM's keys": ({"input_text": "a", "output_text": "b"}, "such as {prompt: input_text, completion: output_text}"),
    "an article": ({"article": "a", "highlights": "b"}, "such as {prompt: article, completion: highlights}"),
    "a dialogue as a text": (
        {"system": "s", "chat": "USER: hi\n\nASSISTANT: hello\n"},
        "its chat is a dialogue as one text; write each of its turns as an object in messages, or set",
    ),
    "an invisible completion": ({"prompt": "a", "completion": "\u200b"}, "completion is empty"),
}


@pytest.mark.parametrize(("record", "message"), _REFUSED.values(), ids=_REFUSED)
def test_a_row_is_refused_with_the_remedy(record: dict[str, Any], message: str) -> None:
    (problem,) = rows.parse([json.dumps(record).encode()]).problems
    assert message in problem.message


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"messages": [{"role": "user", "content": "a\ud800"}, _BLUE]}, "messages[0].content"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b\udfff"}]},
         "conversations[1].value"),
        ({"messages": [_USER, _BLUE, {"role": "tool", "content": {"a": "\ud800"}}, _BLUE]}, "messages[2].content"),
    ],
    ids=["messages", "ShareGPT", "the result of a tool"],
)  # fmt: skip
def test_half_a_character_in_a_turn_is_refused_by_name(record: dict[str, Any], name: str) -> None:
    (problem,) = rows.parse([json.dumps(record).encode()]).problems
    assert problem.message == f"{name} contains half a character (a lone surrogate)"


def test_half_a_character_in_a_key_can_be_reported() -> None:
    row = _row({"prompt": "a", "completion": "b", "k\ud800": 1})
    assert row.unread == (("KeysNotRead", "k\\ud800", 1),)
    for record in ({"prompt": "a", "k\ud800": 1}, {"k\ud800": 1}):
        (problem,) = rows.parse([json.dumps(record).encode()]).problems
        assert "k\\ud800" in problem.message
