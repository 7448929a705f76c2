"""Exactly the answers and the tokens that end them are trained on, and the prompt is the one that
inference uses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune_trainer.data import preparation
from finetune_trainer.data import tokenizer as tokenizer_files
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.example import Example
from finetune_trainer.data.preparation import ReadOptions
from finetune_trainer.data.reading.row import Problem, Row, Turn
from finetune_trainer.errors import RunError

# Templates as models ship them: Llama 2's (with a beginning token in the text), one that strips
# earlier reasoning, one that ends no turn, one that refuses a system turn; and one that no model
# should have.
_LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_OPEN_ENDED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_NO_SYSTEM = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
    "{{ m['content'] + eos_token }}{% endfor %}"
)
_UNSTABLE = "{{ messages | length }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"

_TWO_TURNS = Row(
    1,
    (Turn("user", "Hi there"), Turn("assistant", "Hello."), Turn("user", "And?"), Turn("assistant", "Bye, lazy dog.")),
)
_ONE = Row(1, (Turn("user", "Define: fox"), Turn("assistant", "a quick dog")), plain=True)


def _renderer(
    models: dict[str, Path], family: str = "llama", *, max_length: int = 200, template: str | None = None, **more: Any
) -> Renderer:
    tokenizer = tokenizer_files.load(models[family])
    for name, value in more.items():
        setattr(tokenizer, name, value)
    if template is not None:
        tokenizer.chat_template = template
    return Renderer(
        tokenizer, frozenset({tokenizer.eos_token_id}), max_length=max_length, encoder_decoder=family == "t5"
    )


def _labeled_texts(renderer: Renderer, row: Row) -> list[str]:
    """Returns the text of each run of label tokens."""
    example = renderer.render(row)
    assert isinstance(example, Example)
    runs: list[list[int]] = []
    for index, (token, flag) in enumerate(zip(example.ids, example.loss_mask, strict=True)):
        if flag and (index == 0 or not example.loss_mask[index - 1]):
            runs.append([])
        if flag:
            runs[-1].append(token)
    return [renderer.tokenizer.decode(run) for run in runs]


def _text(renderer: Renderer, row: Row) -> str:
    example = renderer.render(row)
    assert isinstance(example, Example)
    return str(renderer.tokenizer.decode(list(example.ids)))


@pytest.mark.parametrize(
    ("template", "labeled"),
    [
        pytest.param(None, ["Hello.<|im_end|>", "Bye, lazy dog.<|im_end|>"], id="chatml"),
        pytest.param(_LLAMA2, [" Hello. <|im_end|>", " Bye, lazy dog. <|im_end|>"], id="llama2"),
        pytest.param(_REASONING, ["<think>\n\n</think>\n\nBye, lazy dog.<|im_end|>"], id="drops earlier reasoning"),
        pytest.param(_OPEN_ENDED, ["Bye, lazy dog.\n<|im_end|>"], id="open ended"),
    ],
)
def test_each_answer_and_its_stop_token_is_trained_on_and_nothing_else(
    template: str | None, labeled: list[str], models: dict[str, Path]
) -> None:
    """Bug 4: a mask that is off by one, or that counts a merged token at the boundary as part of
    the answer."""
    renderer = _renderer(models, template=template)
    assert _labeled_texts(renderer, _TWO_TURNS) == labeled


@pytest.mark.parametrize("template", [None, _LLAMA2])
def test_the_tokens_are_those_of_the_full_chat(template: str | None, models: dict[str, Path]) -> None:
    renderer = _renderer(models, template=template)
    chat = [{"role": turn.role, "content": turn.content} for turn in _TWO_TURNS.turns]
    text = renderer.tokenizer.apply_chat_template(chat, tokenize=False)
    assert _text(renderer, _TWO_TURNS) == text.removesuffix("\n")
    example = renderer.render(_TWO_TURNS)
    assert isinstance(example, Example)
    ids = renderer.tokenizer(text, add_special_tokens=False).input_ids
    assert list(example.ids) == ids[: len(example.ids)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_prompt_is_what_generation_starts_from_and_the_last_label_is_the_stop_token(
    family: str, models: dict[str, Path]
) -> None:
    """Bug 6: the token that ends a turn isn't trained on."""
    renderer = _renderer(models, family)
    example = renderer.render(_ONE)
    assert isinstance(example, Example)
    prompt = renderer.prompt(_ONE)
    first = example.loss_mask.index(True)
    assert list(example.ids[:first]) == prompt
    assert all(example.loss_mask[first:])
    assert example.ids[-1] in renderer.stops


def test_plain_text_is_prompt_completion_and_an_end_token(models: dict[str, Path]) -> None:
    renderer = _renderer(models, "gpt2")
    assert renderer.rule[0] == "plain text"
    assert _text(renderer, _ONE) == "Define: foxa quick dog</s>"
    assert _labeled_texts(renderer, _ONE) == ["a quick dog</s>"]


def test_an_end_token_is_trained_on_even_if_it_is_the_padding_token(models: dict[str, Path]) -> None:
    """Bug 7: labels that are compared with the padding token lose the end token."""
    renderer = _renderer(models, "gpt2", pad_token="</s>")
    assert renderer.tokenizer.pad_token_id == renderer.tokenizer.eos_token_id
    assert _labeled_texts(renderer, _ONE) == ["a quick dog</s>"]


def _with_bos(models: dict[str, Path], tmp_path: Path, chat: bool) -> Renderer:
    """Returns a renderer whose tokenizer puts a beginning token before any text, as Llama's
    does."""
    from tokenizers import Tokenizer, processors

    folder = tmp_path / "bos"
    shutil.copytree(models["llama" if chat else "gpt2"], folder)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(folder / "tokenizer.json"))
    return Renderer.load(folder, 200)


@pytest.mark.parametrize("prompt", ["Define: fox", "<s>Define: fox"])
def test_plain_text_begins_with_one_beginning_token(prompt: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 8: text that has a beginning token gets a second one."""
    renderer = _with_bos(models, tmp_path, chat=False)
    example = renderer.render(Row(1, (Turn("user", prompt), Turn("assistant", "a dog")), plain=True))
    assert isinstance(example, Example)
    assert example.ids.count(1) == 1
    assert example.ids[0] == 1


def test_a_template_with_a_beginning_token_gets_no_second_one(models: dict[str, Path], tmp_path: Path) -> None:
    """Bug 8: the template's text is tokenized with special tokens again."""
    renderer = _with_bos(models, tmp_path, chat=True)
    renderer.tokenizer.chat_template = _LLAMA2
    example = renderer.render(_TWO_TURNS)
    assert isinstance(example, Example)
    assert example.ids.count(1) == 1


def test_an_encoder_decoder_gets_prompt_and_answer_separately(models: dict[str, Path]) -> None:
    renderer = _renderer(models, "t5")
    example = renderer.render(_ONE)
    assert isinstance(example, Example)
    decode = renderer.tokenizer.decode
    assert decode(list(example.ids[: example.source])) == "Define: fox"
    assert decode(list(example.ids[example.source :])) == "a quick dog</s>"
    assert example.loss_mask == (False,) * example.source + (True,) * (len(example.ids) - example.source)


def test_a_long_answer_is_cut_at_the_end_and_still_trained_on(models: dict[str, Path]) -> None:
    uncut = _renderer(models).render(_ONE)
    cut = _renderer(models, max_length=uncut.loss_mask.index(True) + 2).render(_ONE)  # type: ignore[union-attr]
    assert isinstance(cut, Example)
    assert cut.ids == uncut.ids[: len(cut.ids)]  # type: ignore[union-attr]
    assert sum(cut.loss_mask) == 2


def test_a_prompt_as_long_as_the_row_is_a_problem_with_its_number(models: dict[str, Path]) -> None:
    """Bug 28: a row that is cut before its answer has nothing to train on."""
    uncut = _renderer(models).render(_ONE)
    problem = _renderer(models, max_length=uncut.loss_mask.index(True)).render(_ONE)  # type: ignore[union-attr]
    assert isinstance(problem, Problem)
    assert problem.number == 1
    assert "leaves nothing to train on" in problem.message


def test_a_row_that_the_template_refuses_is_a_problem(models: dict[str, Path]) -> None:
    row = Row(4, (Turn("system", "s"), *_ONE.turns))
    assert _renderer(models, template=_NO_SYSTEM).render(row) == Problem(
        4, "the chat template refuses it: no system (its roles: system, user, assistant)"
    )


def test_messages_without_a_template_are_a_problem(models: dict[str, Path]) -> None:
    problem = _renderer(models, "gpt2").render(_TWO_TURNS)
    assert isinstance(problem, Problem)
    assert "need a chat template" in problem.message


def test_a_template_whose_prompt_isnt_a_prefix_of_the_chat_is_rejected(models: dict[str, Path]) -> None:
    """Bug 5: a template that doesn't mark answers gives a mask of all or nothing. Here the
    renderings are compared, and the row is rejected if they differ."""
    problem = _renderer(models, template=_UNSTABLE).render(_ONE)
    assert isinstance(problem, Problem)
    assert "renders a prompt alone differently" in problem.message


def test_the_tokenizer_agrees_with_transformers_auto_tokenizer(models: dict[str, Path]) -> None:
    for family in ("llama", "qwen2", "gpt2", "t5"):
        own, auto = tokenizer_files.load(models[family]), AutoTokenizer.from_pretrained(models[family])
        text = "Define the noun: fox <|im_end|> a quick, lazy dog"
        assert own(text).input_ids == auto(text).input_ids


def test_a_folder_without_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no tokenizer can be loaded"):
        tokenizer_files.load(tmp_path)


def _prepare(
    models: dict[str, Path], folder: Path, lines: list[Any], *, on_invalid: str = "fail"
) -> preparation.Examples:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return preparation.prepare(path, ReadOptions("dataset.uri", Renderer.load(models["llama"], 64), on_invalid))


_GOOD = {"prompt": "fox", "completion": "a dog"}
_LONG = {"prompt": "fox " * 80, "completion": "a dog"}


def test_bad_rows_are_dropped_and_counted_if_on_invalid_is_drop(models: dict[str, Path], tmp_path: Path) -> None:
    read = _prepare(models, tmp_path, [_GOOD, "{", _LONG, _GOOD], on_invalid="drop")
    assert (len(read), read.dropped, read.duplicates) == (2, 2, 1)
    assert read.label_tokens < read.tokens


@pytest.mark.parametrize(
    ("lines", "on_invalid", "message"),
    [
        pytest.param([_GOOD, "{", _LONG], "fail", "2 rows can't be used: row 2: isn't JSON", id="some"),
        pytest.param([_LONG, _LONG], "drop", "no usable row (row 1: the prompt has", id="all too long"),
        pytest.param([_LONG], "fail", "1 row can't be used, and no other row is left", id="all too long, fail"),
        pytest.param([], "fail", "the file is empty", id="empty"),
    ],
)
def test_unusable_rows_are_rejected_with_their_numbers(
    lines: list[Any], on_invalid: str, message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RunError) as error:
        _prepare(models, tmp_path, lines, on_invalid=on_invalid)
    assert error.value.reason == "DatasetInvalid"
    assert message in error.value.message


def test_rendering_a_row_imports_no_torch(models: dict[str, Path]) -> None:
    code = (
        "import sys, pathlib; from finetune_trainer.data.chat_rendering import Renderer;"
        "from finetune_trainer.data.reading.row import Row, Turn;"
        "r = Renderer.load(pathlib.Path(sys.argv[1]), 64);"
        "r.render(Row(1, (Turn('user', 'a'), Turn('assistant', 'b')))); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(models["llama"])], check=True, env={"PYTHONPATH": "operator:trainer_image"}
    )
