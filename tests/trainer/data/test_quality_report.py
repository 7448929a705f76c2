"""The report on rows before training: figures that can be counted by hand, splits that are stable,
and chat templates that are checked."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.messages.data_report import DataReport
from finetune_trainer.data import preparation, quality_report, quality_report_text, splits, template_checks, token_cache
from finetune_trainer.data import tokenizer as tokenizer_files
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.example import Example
from finetune_trainer.data.preparation import ReadOptions
from finetune_trainer.data.reading.row import Problem, Row, Turn
from finetune_trainer.data.reading.rows import InputFile
from finetune_trainer.data.row_statistics import RowStatistics
from finetune_trainer.errors import RunError

_CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def _report(
    folder: Path, model: Path | None, train: list[Any], *, longest: int = 64, test: list[Any] | None = None
) -> DataReport:
    renderer = Renderer.load(model, longest) if model else None
    measured: Any = {}
    for name, rows in (("train", train), ("test", test)):
        if rows is None:
            continue
        path = folder / f"{name}.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        options = ReadOptions("dataset.uri", renderer, "drop")
        if renderer:
            cache = token_cache.build(folder / "cache", name, path, options)
            measured[name] = RowStatistics.of_tokens(cache)
        else:
            examples = preparation.prepare(path, options)
            measured[name] = RowStatistics.of_examples(examples)
    return quality_report.report(splits.split_rows(measured, None, None), max_length=longest, renderer=renderer)


_ROWS = [_pair("fox", "a dog"), _pair("fox", "a dog"), "{", _pair("fox", "a cat"), _pair("hen", "b " * 90)]


def test_duplicates_leaks_cuts_and_dropped_rows_are_reported_by_number(models: dict[str, Path], tmp_path: Path) -> None:
    report = _report(tmp_path, models["llama"], _ROWS, test=[_pair("fox", "a dog"), _pair("fox", "an owl")])
    train = report.splits[0]
    assert (train.rows, train.read, train.dropped) == (4, 5, 1)
    assert [(row.row, row.reason[:10]) for row in train.dropped_rows] == [(3, "isn't JSON")]
    assert (train.duplicates.rows, train.duplicates.groups, train.same_prompts) == (1, ((1, 2),), 1)
    assert (train.truncated.rows, train.truncated.numbers) == (1, (5,))
    (leak,) = report.leaks
    assert (leak.first, leak.second, leak.rows, leak.prompts, leak.examples) == ("train", "test", 1, 2, ((1, 1),))
    reasons = {warning.reason for warning in report.warnings}
    assert reasons == {"FewExamples", "Leaks", "Duplicates", "Truncated", "RowsDropped", "Blanks"}
    status = quality_report.summary(report)
    assert (status.rows, status.test_rows, status.dropped, status.duplicates, status.leaks) == (4, 2, 1, 1, 1)
    text = "\n".join(quality_report_text.lines(report))
    assert "row 3: isn't JSON" in text
    assert "⟦a dog<|im_end|>⟧" in text


def test_figures_are_what_counting_the_rendered_rows_gives(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [_pair("Define the noun: fox. " + "x" * i, "a dog " * (1 + i % 3)) for i in range(30)]
    report = _report(tmp_path, models["llama"], rows, longest=200)
    renderer = Renderer.load(models["llama"], 200)
    rendered = [renderer.render(Row(0, (Turn("user", r["prompt"]), Turn("assistant", r["completion"])))) for r in rows]
    lengths = [len(example.ids) for example in rendered if isinstance(example, Example)]
    train = report.splits[0]
    assert train.tokens == sum(lengths)
    assert train.label_tokens == sum(sum(example.loss_mask) for example in rendered if isinstance(example, Example))
    assert train.label_share == train.label_tokens / train.tokens
    assert (train.lengths.minimum, train.lengths.maximum) == (min(lengths), max(lengths))
    assert sum(train.lengths.counts) == 30
    for (begin, end), count in zip(pairwise(train.lengths.edges), train.lengths.counts, strict=True):
        assert count == sum(begin <= length < end for length in lengths)
    assert 0 < (train.padding_share or 0) < 0.5
    assert train.shared.tokens > 29 * 8  # the instruction
    sample = report.samples[0]
    assert [piece.learnt for piece in sample.pieces] == [False, True]
    assert sample.pieces[1].text == "a dog <|im_end|>"


def test_without_a_tokenizer_lengths_are_characters(tmp_path: Path) -> None:
    report = _report(tmp_path, None, [_pair("abc", "de"), _pair("a", "b")])
    assert report.unit == "characters"
    assert report.splits[0].tokens is None
    assert (report.splits[0].lengths.minimum, report.splits[0].lengths.maximum) == (2, 5)


def _digests(texts: list[str]) -> Any:
    return np.array([list(hashlib.blake2b(text.encode(), digest_size=16).digest()) for text in texts], np.uint8)


def _split_of_each(texts: list[str], validation: float, test: float) -> dict[str, str]:
    """Returns the split of each text, and asserts that every text is in one."""
    parts = splits.hold_out(_digests(texts), validation, test)
    assert parts.validation is not None
    assert parts.test is not None
    by_name = (("train", parts.train), ("validation", parts.validation), ("test", parts.test))
    assert sorted(np.concatenate([index for _, index in by_name]).tolist()) == list(range(len(texts)))
    return {texts[i]: name for name, index in by_name for i in index.tolist()}


@given(st.lists(st.text(max_size=4), max_size=60), st.floats(0.05, 0.49), st.floats(0.05, 0.49), st.randoms())
@settings(max_examples=50, deadline=None)
def test_a_row_stays_in_its_split_when_others_are_added(
    texts: list[str], validation: float, test: float, random: Any
) -> None:
    before = [f"base {index}" for index in range(400)]
    more = [*before, *texts]
    random.shuffle(more)
    first, second = _split_of_each(before, validation, test), _split_of_each(more, validation, test)
    assert [text for text in before if first[text] != second[text]] == []


def test_the_shares_are_close_to_the_fractions_and_one_fraction_doesnt_affect_the_other() -> None:
    digests = _digests([str(index) for index in range(4000)])
    parts = splits.hold_out(digests, 0.1, 0.2)
    assert parts.validation is not None
    assert parts.test is not None
    assert 340 < len(parts.validation) < 460
    assert 700 < len(parts.test) < 900
    alone = splits.hold_out(digests, 0.1, None)
    assert np.array_equal(alone.validation, parts.validation)  # type: ignore[arg-type]


def test_equal_rows_stay_together_and_a_split_is_never_empty() -> None:
    parts = splits.hold_out(_digests(["a"] * 50 + ["b", "c"]), 0.4, None)
    assert parts.validation is not None
    assert len(set(range(50)) & set(parts.validation.tolist())) in (0, 50)
    assert len(splits.hold_out(_digests(["a", "b"]), 0.01, None).validation) == 1  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"1 row can't be split; give more rows or validation\.uri"):
        splits.hold_out(_digests(["a"]), 0.1, None)


def test_a_weight_is_how_often_a_row_occurs_in_an_epoch() -> None:
    digests = _digests([str(index) for index in range(2000)])
    file_index = np.repeat(np.array([0, 1], np.int32), 1000)
    index = splits.mixture(digests, file_index, np.arange(2000), [2.5, 0.25])
    counts = np.bincount(index, minlength=2000)
    assert set(counts[:1000].tolist()) == {2, 3}
    assert 2400 < counts[:1000].sum() < 2600
    assert set(counts[1000:].tolist()) == {0, 1}
    assert 200 < counts[1000:].sum() < 300


def test_each_file_of_a_mixture_is_read_with_its_own_columns(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a\nfox,dog\nhen,cat\n")
    (tmp_path / "b.jsonl").write_text('{"text": "a long text"}\n{"text": 7}\n')
    files = (
        InputFile(tmp_path / "a.csv", "a.csv", columns={"prompt": "q", "completion": "a"}, weight=2),
        InputFile(tmp_path / "b.jsonl", "b.jsonl"),
    )
    renderer = Renderer.load(models["llama"], 64)
    with pytest.raises(RunError, match=r"1 row can't be used: b\.jsonl row 2: text is 7, which isn't text"):
        preparation.prepare(files, ReadOptions("dataset.sources", renderer, "fail"))
    cache = token_cache.build(tmp_path / "c", "k", files, ReadOptions("dataset.sources", renderer, "drop"))
    parts = splits.split_rows({"train": RowStatistics.of_tokens(cache)}, None, None)
    train = quality_report.report(parts, max_length=64, renderer=renderer).splits[0]
    assert (train.rows, train.examples) == (3, 5)
    assert [(file.name, file.container, file.format, file.weight) for file in train.files] == [
        ("a.csv", "csv", "prompt-completion", 2),
        ("b.jsonl", "jsonl", "text", 1),
    ]
    assert [row.file for row in train.dropped_rows] == ["b.jsonl"]


def _renderer(models: dict[str, Path], template: str, first: list[int] | None = None) -> Renderer:
    tokenizer = tokenizer_files.load(models["llama"])
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, frozenset({tokenizer.eos_token_id}), max_length=64)
    renderer._encoder.beginning = renderer._encoder.beginning if first is None else first
    return renderer


def test_a_good_template_passes_with_a_list_of_what_was_checked(models: dict[str, Path]) -> None:
    assert "the stop token '<|im_end|>' is trained on" in template_checks.check_template(
        _renderer(models, _CHATML), own=True
    )
    assert template_checks.check_template(Renderer.load(models["gpt2"], 64), own=True) == ()
    marked = _renderer(models, _CHATML)
    marked.tokenizer.bos_token = "<|im_start|>"  # as in SmolLM2
    assert "one beginning token" in template_checks.check_template(marked, own=True)


_TEMPLATES = [
    ("two beginnings", "{{ bos_token }}{{ bos_token }}" + _CHATML, "2 beginning tokens ('<s>')"),
    ("one a turn", _CHATML.replace("'<|im_start|>", "bos_token + '<|im_start|>"), "beginning tokens"),
    ("in capitals", _CHATML.replace("m.content", "(m.content | upper)"), "changes an answer: 'A tower with a light.'"),
    ("the answer cut", _CHATML.replace("m.content", "m.content[:4]"), "changes an answer"),
    ("the question again", _CHATML.replace("m.content", "(messages[0].content + m.content)"), "repeats the question"),
    ("no prefix", "{{ messages | length }}" + _CHATML, "renders a prompt alone differently"),
    ("a syntax error", "{% for m in messages %}{{ m.content }}", "can't render a plain question and answer"),
    ("a bug", "{{ messages[0].content / 0 }}", "can't render a plain question and answer"),
    ("nothing", "{{ '' }}", "no token to train on"),
]


@pytest.mark.parametrize(("template", "message"), [pytest.param(*rest, id=id) for id, *rest in _TEMPLATES])
def test_a_template_that_trains_on_something_else_is_rejected(
    template: str, message: str, models: dict[str, Path]
) -> None:
    for own, reason, remedy in ((True, "ModelInvalid", "dataset.chatTemplate"), (False, "InvalidConfig", "leave the")):
        with pytest.raises(RunError) as error:
            template_checks.check_template(_renderer(models, template), own=own)
        assert error.value.reason == reason
        assert message in error.value.message
        assert remedy in error.value.message


def test_a_beginning_token_that_the_tokenizer_adds_must_be_in_the_template(models: dict[str, Path]) -> None:
    """Bug 8, the reverse: a chat without a beginning token, for a model that was always trained
    with one."""
    with pytest.raises(RunError, match="writes no beginning token"):
        template_checks.check_template(_renderer(models, _CHATML, first=[1]), own=True)
    assert "one beginning token" in template_checks.check_template(
        _renderer(models, "{{ bos_token }}" + _CHATML, first=[1]), own=True
    )


def test_the_users_template_is_used_and_a_missing_file_is_reported(models: dict[str, Path]) -> None:
    assert Renderer.load(models["gpt2"], 64, _CHATML).chat
    with pytest.raises(RunError, match=r"the model's folder has no file 'other\.jinja'"):
        Renderer.load(models["gpt2"], 64, "other.jinja")


def test_an_answer_that_contains_the_stop_tokens_text_is_a_problem(models: dict[str, Path]) -> None:
    rendered = _renderer(models, _CHATML).render(Row(3, (Turn("user", "a"), Turn("assistant", "b<|im_end|>c"))))
    assert isinstance(rendered, Problem)
    assert (
        rendered.message == "an answer contains the stop token '<|im_end|>', which would end it; remove it, or "
        "set dataset.rendering.controlTokens: encode"
    )


def test_every_token_of_a_text_is_trained_on_except_the_first(models: dict[str, Path]) -> None:
    rendered = _renderer(models, _CHATML).render(Row(1, (Turn("text", "A tower with a light."),), plain=True))
    assert isinstance(rendered, Example)
    assert rendered.loss_mask == (False, *[True] * (len(rendered.ids) - 1))
    assert rendered.ids[-1] == tokenizer_files.load(models["llama"]).eos_token_id


_SNIPPETS = st.sampled_from([
    "{{ m.content }}", "{% for m in messages %}", "{% endfor %}", "{{ bos_token }}", "{{ eos_token }}", "<|im_end|>",
    "{% if add_generation_prompt %}", "{% endif %}", "{{ messages[0]['content'] }}", "{{ messages | tojson }}", "{{",
    "{{ raise_exception('no') }}", "{{ m.role.x.y }}", "text", "{% set x = messages[1:] %}", "{{ x[0].content }}",
    "{{ 1 / 0 }}",
])  # fmt: skip


@given(snippets=st.lists(_SNIPPETS, max_size=8))
@settings(max_examples=100, deadline=None)
def test_every_template_is_used_or_fails_with_a_run_error(snippets: list[str], models: dict[str, Path]) -> None:
    renderer = _renderer(models, "".join(snippets) or "x")
    row = Row(1, (Turn("user", "What?"), Turn("assistant", "That."), Turn("user", "And?"), Turn("assistant", "So.")))
    try:
        template_checks.check_template(renderer, own=False)
        rendered = renderer.render(row)
    except RunError as error:
        assert error.reason in ("InvalidConfig", "ModelInvalid")  # noqa: PT017
    else:
        assert isinstance(rendered, Example | Problem)


def test_near_duplicates_are_reported_by_number(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [_pair("A fox?", "a dog"), _pair("a  fox", "A dog!"), _pair("a fox", "a cat"), _pair("A fox?", "a dog")]
    report = _report(tmp_path, models["llama"], rows, test=[_pair("a fox", "A DOG"), _pair("A fox?", "a dog")])
    train = report.splits[0]
    assert (train.duplicates.rows, train.duplicates.groups) == (1, ((1, 4),))
    assert (train.near_duplicates.rows, train.near_duplicates.groups) == (1, ((1, 2),))
    (leak,) = report.leaks
    assert (leak.rows, leak.examples, leak.near, leak.near_examples) == (1, ((1, 2),), 1, ((1, 1),))
    assert {"NearDuplicates", "NearLeaks"} <= {warning.reason for warning in report.warnings}
    text = "\n".join(quality_report_text.lines(report))
    assert "near-duplicates: 1 (rows 1≈2)" in text
    assert "test rows that are also in train: 1 identical (rows 1=2), 1 nearly identical (rows 1≈1), 2 with the" in text


def test_rows_without_a_sure_label_are_skipped_and_the_data_is_accepted(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "weak.jsonl"
    probabilities = [[0.1, 0.9], [0.4, 0.6], [0.5, 0.5], [0.0, 0.0], [0.8, 0.2]]
    path.write_text("".join(json.dumps({"text": f"mail {i}", "probs": p}) + "\n" for i, p in enumerate(probabilities)))
    file = InputFile(path, path.name, labels=("ham", "spam"), min_label_probability=0.7)
    examples = preparation.prepare([file], ReadOptions("dataset.uri", None, "fail"))
    assert (len(examples), examples.dropped, examples.unlabelled) == (2, 3, 3)
    statistics = RowStatistics.of_examples(examples)
    report = quality_report.report(splits.split_rows({"train": statistics}, None, None), max_length=64, renderer=None)
    train = report.splits[0]
    assert (train.rows, train.dropped, train.unlabelled) == (2, 3, 3)
    assert [row.row for row in train.dropped_rows] == [2, 3, 4]
    assert "has a probability of 0.6, less than dataset.minLabelProbability 0.7" in train.dropped_rows[0].reason
    assert {warning.reason for warning in report.warnings} == {"FewExamples", "Unlabelled"}
    path.write_text(path.read_text() + '{"text": "mail", "probs": [7, 1]}\n')
    with pytest.raises(RunError, match=r"1 row can't be used: row 6: probabilities are \[7, 1\]"):
        preparation.prepare([file], ReadOptions("dataset.uri", None, "fail"))


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (("data/train-00000.parquet", "data/test-00000.parquet"), "data/test-00000.parquet is trained on"),
        (("train.jsonl", "validation.jsonl", "dev/a.jsonl"), "validation.jsonl, dev/a.jsonl are trained on"),
        (("/home/test/set/train.jsonl", "/home/test/set/more.jsonl"), ""),
        (("test-a.jsonl", "test-b.jsonl"), ""),
        (("testimonials.jsonl", "validated.jsonl"), ""),
        (("test.jsonl",), ""),
    ],
)
def test_files_that_are_named_as_held_out_rows_are_pointed_out(
    names: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(_pair("fox", "a dog")) + "\n")
    files = [InputFile(tmp_path / "rows.jsonl", name) for name in names]
    examples = preparation.prepare(files, ReadOptions("dataset.uri", None, "fail"))
    measured: Any = {"train": RowStatistics.of_examples(examples)}
    report = quality_report.report(splits.split_rows(measured, None, None), max_length=64, renderer=None)
    messages = [warning.message for warning in report.warnings if warning.reason == "HeldOutFiles"]
    assert [message.split(";")[0] for message in messages] == ([named] if named else [])
