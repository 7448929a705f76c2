"""Checks that a chat template teaches a model what it should, before anything is trained.

A template must write one beginning token, a stop token must count in the loss, and what counts in
the loss must be the answer. The module doesn't import torch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.example import Example
from finetune_trainer.data.reading.findings import CHANGED
from finetune_trainer.data.reading.row import Row, Turn
from finetune_trainer.data.rendering.answers import INSEPARABLE
from finetune_trainer.errors import RunError

_QUESTIONS = ("What is a lighthouse?", "And a buoy?")
_ANSWERS = ("A tower with a light.", "A float that marks a channel.")
_SYSTEM = "You are brief."


def check_template(renderer: Renderer, *, own: bool) -> tuple[str, ...]:
    """Check the template, and return what was checked as phrases; none if there is no template.

    `own` is whether the template is the tokenizer's own. Raises RunError with the reason and the
    remedy.
    """
    if not renderer.chat:
        return ()
    refuse = _Refusal(own)
    probes = [
        _probe(renderer, row, refuse)
        for row in (_row(_QUESTIONS[:1], _ANSWERS[:1]), _row(_QUESTIONS[:1], _ANSWERS[1:]), _row(_QUESTIONS, _ANSWERS))
    ]
    beginning = _check_beginning(renderer, probes, refuse)
    stop = _check_stop(renderer, probes, refuse)
    for probe, answer in zip(probes, (_ANSWERS[0], _ANSWERS[1], _ANSWERS[-1]), strict=True):
        _check_round_trip(renderer, probe, answer, refuse)
    checks = [
        beginning,
        f"the stop token {stop!r} is trained on",
        "the answer is trained on, and nothing of the prompt is",
    ]
    with_system = renderer.render(_row(_QUESTIONS[:1], _ANSWERS[:1], system=_SYSTEM))
    if not isinstance(with_system, Example):
        checks.append("the template doesn't accept a system prompt")
    elif _SYSTEM not in renderer.tokenizer.decode(list(with_system.ids)):
        checks.append("the template leaves out a system prompt")
    return tuple(checks)


class _Refusal:
    """Makes the error about a template, which names its field and the remedy."""

    def __init__(self, own: bool) -> None:
        self._own = own

    def __call__(self, reason: str) -> RunError:
        if self._own:
            return RunError(
                "ModelInvalid",
                f"model.uri: the tokenizer's chat template {reason}; fix chat_template, or set "
                "dataset.chatTemplate to another one",
            )
        return RunError("InvalidConfig", f"dataset.chatTemplate {reason}; fix it, or leave the field out")


def _row(questions: tuple[str, ...], answers: tuple[str, ...], system: str = "") -> Row:
    turns = [Turn("system", system)] if system else []
    for question, answer in zip(questions, answers, strict=True):
        turns += [Turn("user", question), Turn("assistant", answer)]
    return Row(0, tuple(turns))


def _probe(renderer: Renderer, row: Row, refuse: _Refusal) -> Example:
    example = renderer.render_uncut(row)
    if not isinstance(example, Example):
        if INSEPARABLE in example.message:
            raise refuse(example.message.removeprefix("the chat template ").partition("; fix it")[0])
        if CHANGED in example.message:
            raise refuse(example.message.removeprefix("the chat template ").rpartition(";")[0])
        raise refuse(f"can't render a plain question and answer ({example.message})")
    return example


def _check_beginning(renderer: Renderer, probes: list[Example], refuse: _Refusal) -> str:
    """Check that a text begins with one beginning token if the tokenizer adds one itself.

    Such a tokenizer belongs to a model that was trained with a beginning token.
    """
    token = renderer.tokenizer.bos_token_id
    if token is None or token in renderer.stops:
        return "the tokenizer has no beginning token of its own"
    # Some chat models (SmolLM2) mark each turn with this very token. Then a role follows it, and no
    # special token.
    special = set(renderer.tokenizer.all_special_ids)
    marks_turns = not any(a == token and b in special for p in probes for a, b in pairwise(p.ids))
    counts = {min(probe.ids.count(token), 1 if marks_turns else len(probe.ids)) for probe in probes}
    if max(counts) > 1:
        raise refuse(
            f"begins a text with {max(counts)} beginning tokens ({renderer.tokenizer.bos_token!r}) instead of one"
        )
    if counts == {0} and renderer.beginning:
        raise refuse(
            f"writes no beginning token ({renderer.tokenizer.bos_token!r}), which the tokenizer puts before any text; "
            "begin it with {{ bos_token }}"
        )
    if any(probe.ids[0] != token for probe in probes if token in probe.ids):
        raise refuse(f"has its beginning token ({renderer.tokenizer.bos_token!r}) within the text")
    return "one beginning token" if counts == {1} else "no beginning token, which the tokenizer doesn't use either"


def _check_stop(renderer: Renderer, probes: list[Example], refuse: _Refusal) -> str:
    for probe in probes:
        if probe.ids[-1] not in renderer.stops or not probe.loss_mask[-1]:
            raise refuse("teaches no stop token, so an answer would never end")
    return str(renderer.tokenizer.convert_ids_to_tokens(probes[0].ids[-1]))


def _check_round_trip(renderer: Renderer, probe: Example, answer: str, refuse: _Refusal) -> None:
    """Check that the last run of tokens in the loss is the answer, and no run has a question."""
    runs: list[list[int]] = []
    for index, (token, in_loss) in enumerate(zip(probe.ids, probe.loss_mask, strict=True)):
        if in_loss and (index == 0 or not probe.loss_mask[index - 1]):
            runs.append([])
        if in_loss:
            runs[-1].append(token)
    tokenizer = renderer.tokenizer
    texts = [
        _without_extra_spaces(tokenizer.decode([token for token in run if token not in renderer.stops])) for run in runs
    ]
    expected = _without_extra_spaces(tokenizer.decode(_ids(tokenizer, answer)))
    if not texts or texts[-1].count(expected) != 1:
        raise refuse(f"changes an answer: {answer!r} is trained as {texts[-1] if texts else ''!r}")
    questions = [_without_extra_spaces(tokenizer.decode(_ids(tokenizer, question))) for question in _QUESTIONS]
    if any(question in text for question in questions for text in texts):
        raise refuse("repeats the question in the answer, so the question would be trained on too")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _without_extra_spaces(text: str) -> str:
    return " ".join(text.split())
