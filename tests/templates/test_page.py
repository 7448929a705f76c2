"""docs/templates.md is up to date, and what is trained on follows the prompt of inference."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.spec.rendering import RenderingSpec
from finetune_trainer.data.example import Example
from finetune_trainer.data.reading import dialogues
from templates.__main__ import PAGE, main
from templates.families import FAMILIES, Family
from templates.page import DATE, DIALOGUE, PLAIN, page, renderer, row, trained

_BY_NAME = {family.name: family for family in FAMILIES}
_EACH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def test_the_page_is_up_to_date() -> None:
    assert len(FAMILIES) == 20
    assert page() == PAGE.read_text("utf-8"), "docs/templates.md is out of date; run make templates"


def test_an_outdated_page_is_detected_and_replaced(tmp_path: Path) -> None:
    copy = tmp_path / "templates.md"
    assert main(["--check"], copy) == 1
    assert main([], copy) == 0
    assert main(["--check"], copy) == 0


@_EACH
def test_every_answer_of_a_plain_dialogue_is_trained_on(family: Family) -> None:
    texts = [run for example in trained(family, PLAIN) for run in example]
    assert len(texts) == 3
    for number, text in enumerate(texts):
        assert f"It is {number + 1}." in text
        assert text.endswith(family.stops)


@_EACH
@pytest.mark.parametrize("value", [PLAIN, DIALOGUE], ids=["plain", "call and reasoning"])
def test_what_comes_before_an_answer_is_the_prompt_of_inference(family: Family, value: dict[str, list[object]]) -> None:
    using = renderer(family)
    outcome = using.render(row(value))
    if not isinstance(outcome, Example):
        assert "the chat template" in outcome.message
        return
    turns = row(value).turns
    prompts = [
        using.template.render(turns[:index], row(value), answer=True)
        for index, turn in enumerate(turns)
        if turn.role == "assistant"
    ]
    beginnings: list[str] = []
    for example in (*outcome.earlier, outcome):
        begins = [i for i in range(1, len(example.ids)) if example.loss_mask[i] and not example.loss_mask[i - 1]]
        beginnings += [str(using.tokenizer.decode(list(example.ids[:begin]))) for begin in begins]
    assert beginnings == prompts


@pytest.mark.parametrize(
    ("name", "reasoning", "expected"),
    [
        ("DeepSeek-R1 (distilled)", "train", "I know Rome.\n</think>\n\nNo, it is mild.<|end_of_sentence|>"),
        ("DeepSeek-R1 (distilled)", "remove", "\n</think>\n\nNo, it is mild.<|end_of_sentence|>"),
        ("DeepSeek-R1 (distilled)", "mask", "No, it is mild.<|end_of_sentence|>"),
        ("Nemotron", "train", "I know Rome.\n</think>No, it is mild.<|end_of_sentence|>"),
        ("Qwen3", "train", "<think>\nI know Rome.\n</think>\n\nNo, it is mild.<|im_end|>"),
        ("Qwen3", "mask", "No, it is mild.<|im_end|>"),
        ("Magistral", "mask", "No, it is mild.<|im_end|>"),
        ("DeepSeek-V3.1", "train", "No, it is mild.<|end_of_sentence|>"),
    ],
)
def test_reasoning_is_trained_on_or_not(name: str, reasoning: str, expected: str) -> None:
    answer = {"role": "assistant", "content": "No, it is mild.", "reasoning_content": "I know Rome."}
    assert _trained_answer(name, reasoning, answer) == expected
    if name.startswith("DeepSeek"):
        inline = {"role": "assistant", "content": "<think>\nI know Rome.\n</think>\n\nNo, it is mild."}
        assert _trained_answer(name, reasoning, inline) == expected


def _trained_answer(name: str, reasoning: str, answer: dict[str, str]) -> str:
    rendering = RenderingSpec.model_validate({"reasoning": reasoning, "date": DATE})
    using = renderer(_BY_NAME[name], rendering)
    turns = [{"role": "user", "content": "And in Rome?"}, answer]
    outcome = using.render(dialogues.adjusted(row({"messages": turns}), rendering))
    assert isinstance(outcome, Example)
    ids = [token for token, in_loss in zip(outcome.ids, outcome.loss_mask, strict=True) if in_loss]
    return str(using.tokenizer.decode(ids))


def test_only_the_last_answer_is_trained_on_if_the_job_says_so() -> None:
    rendering = RenderingSpec(answers="last", date=DATE)
    assert trained(_BY_NAME["Qwen3"], PLAIN, rendering) == [["<think>\n\n</think>\n\nIt is 3.<|im_end|>"]]
    outcome = renderer(_BY_NAME["Qwen3"], rendering).render(row(PLAIN))
    assert isinstance(outcome, Example)
    assert outcome.omissions == ()


def test_a_date_is_that_of_the_job_and_a_choice_depends_on_the_row() -> None:
    turns = row(PLAIN).turns[:1]
    dated = _BY_NAME["Llama 3.2"]
    first, second = (renderer(dated, RenderingSpec(date=day)).template for day in ("2026-11-30", "2026-12-01"))
    for template, day in ((first, "30 Nov 2026"), (second, "01 Dec 2026"), (first, "30 Nov 2026")):
        assert f"Today: {day}" in template.render(turns, row(PLAIN))
    assert (first.date, renderer(_BY_NAME["Qwen3"]).template.date) == ("2026-11-30", None)
    choice = Family("random", "", "{{ range(90000) | list | random }}")
    template = renderer(choice).template
    assert template.picks_at_random
    assert len({template.render(turns, row(PLAIN)) for _ in range(3)}) == 1
