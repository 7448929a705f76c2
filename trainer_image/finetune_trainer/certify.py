"""Whether a chat template teaches what it should, asked before anything is trained: one beginning token, a stop token
that is learnt, and what is learnt is the answer. Called by `data` and preflight. No torch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from finetune_trainer.failure import Failed
from finetune_trainer.render import Example, Renderer
from finetune_trainer.shapes import Row, Turn

_ASKED = ("What is a lighthouse?", "And a buoy?")
_ANSWERS = ("A tower with a light.", "A float that marks a channel.")
_SYSTEM = "You are brief."


def certify(renderer: Renderer, *, own: bool) -> tuple[str, ...]:
    """What was checked, for people; nothing where there is no template.

    `own`: the template is the tokenizer's. Raises Failed with the reason and the remedy.
    """
    if not renderer.chat:
        return ()
    refuse = _Refusal(own)
    probes = [
        _probe(renderer, row, refuse)
        for row in (_row(_ASKED[:1], _ANSWERS[:1]), _row(_ASKED[:1], _ANSWERS[1:]), _row(_ASKED, _ANSWERS))
    ]
    one, other, both = probes
    beginning = _beginning(renderer, probes, refuse)
    stop = _stop(renderer, probes, refuse)
    for probe, answers in ((one, _ANSWERS[:1]), (other, _ANSWERS[1:]), (both, _ANSWERS[-1:])):
        _round_trip(renderer, probe, answers[-1], refuse)
    found = [beginning, f"the stop token {stop!r} is learnt", "what is learnt is the answer, and nothing of the prompt"]
    system = renderer.render(_row(_ASKED[:1], _ANSWERS[:1], system=_SYSTEM))
    if not isinstance(system, Example):
        found.append("the template takes no system prompt")
    elif _SYSTEM not in renderer.tokenizer.decode(list(system.ids)):
        found.append("the template leaves a system prompt out")
    return tuple(found)


class _Refusal:
    def __init__(self, own: bool) -> None:
        self._own = own

    def __call__(self, why: str) -> Failed:
        if self._own:
            return Failed(
                "ModelInvalid",
                f"model.uri: the tokenizer's chat template {why}; mend chat_template, or give one in "
                "dataset.chatTemplate",
            )
        return Failed("InvalidConfig", f"dataset.chatTemplate {why}; mend it, or leave the field out")


def _row(asked: tuple[str, ...], answers: tuple[str, ...], system: str = "") -> Row:
    turns = [Turn("system", system)] if system else []
    for question, answer in zip(asked, answers, strict=True):
        turns += [Turn("user", question), Turn("assistant", answer)]
    return Row(0, tuple(turns))


def _probe(renderer: Renderer, row: Row, refuse: _Refusal) -> Example:
    try:
        found = renderer.whole(row)
    except Failed:
        raise refuse(
            "renders a prompt alone differently from the same prompt with its answer, so what is learnt can't be told "
            "apart"
        ) from None
    if not isinstance(found, Example):
        raise refuse(f"can't render a plain question and answer ({found.message})")
    return found


def _beginning(renderer: Renderer, probes: list[Example], refuse: _Refusal) -> str:
    """A tokenizer that puts a beginning token before any text belongs to a model that has always seen one."""
    token = renderer.tokenizer.bos_token_id
    if token is None or token in renderer.stops:
        return "the tokenizer has no beginning token of its own"
    # Some chat models (SmolLM2) mark each turn with this very token; a role follows it then, and no special token.
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
    return "one beginning token" if counts == {1} else "no beginning token, and the tokenizer asks for none"


def _stop(renderer: Renderer, probes: list[Example], refuse: _Refusal) -> str:
    for probe in probes:
        if probe.ids[-1] not in renderer.stops or not probe.learnt[-1]:
            raise refuse("teaches no stop token, so an answer would never end")
    return str(renderer.tokenizer.convert_ids_to_tokens(probes[0].ids[-1]))


def _round_trip(renderer: Renderer, probe: Example, answer: str, refuse: _Refusal) -> None:
    """The last run of learnt tokens says the answer, and no question is learnt."""
    runs: list[list[int]] = []
    for index, (token, flag) in enumerate(zip(probe.ids, probe.learnt, strict=True)):
        if flag and (index == 0 or not probe.learnt[index - 1]):
            runs.append([])
        if flag:
            runs[-1].append(token)
    tokenizer = renderer.tokenizer
    said = [_plain(tokenizer.decode([token for token in run if token not in renderer.stops])) for run in runs]
    wanted = _plain(tokenizer.decode(_ids(tokenizer, answer)))
    if not said or wanted not in said[-1]:
        raise refuse(f"changes an answer: {answer!r} is learnt as {said[-1] if said else ''!r}")
    asked = [_plain(tokenizer.decode(_ids(tokenizer, question))) for question in _ASKED]
    if any(question in text for question in asked for text in said):
        raise refuse("repeats the question in the answer, so that it would be learnt")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _plain(text: str) -> str:
    return " ".join(text.split())
