"""Gives preference rows the keys prompt, chosen and rejected, whatever tool they were written for.

The shapes are those of TRL, hh-rlhf, UltraFeedback, Orca, LLaMA-Factory, ShareGPT, OpenAI, Argilla,
ms-swift and SHP. The module is pure.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Any

from finetune_trainer.data.reading.turns import parsed_list, role

_CHOSEN = ("chosen", "preferred_output", "chosen_response", "chosen_messages")
_REJECTED = ("rejected", "non_preferred_output", "rejected_response", "rejected_messages")
_PROMPTS = ("prompt", "question", "query", "input")
_SHP = ("human_ref_A", "human_ref_B")
_SPEAKERS = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")


def is_pair(value: Mapping[str, Any]) -> bool:
    """Whether a record has both a chosen and a rejected answer."""
    has_sides = all(any(name in value for name in names) for names in (_CHOSEN, _REJECTED))
    return has_sides or all(name in value for name in _SHP)


def normalized(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with prompt, chosen and rejected; what was read under other names is gone."""
    record = dict(value)
    if all(name in record for name in _SHP) and record.get("labels") in (0, 1):
        answers = [record.pop(name) for name in _SHP]
        record["chosen"], record["rejected"] = answers if record.pop("labels") == 1 else reversed(answers)
        record["prompt"] = record.pop("history", None)
    for ours, names in (("chosen", _CHOSEN), ("rejected", _REJECTED)):
        name = next((name for name in names if name in record), None)
        if name is not None:
            record[ours] = _answer(record.pop(name))
    _put_dialogue(record)
    _put_prompt(record)
    return {key: content for key, content in record.items() if content is not None}


def _put_dialogue(record: dict[str, Any]) -> None:
    """Use the dialogue next to the answers as the prompt: of ShareGPT, OpenAI, or with its chosen
    answer."""
    opened = record.get("input")
    if isinstance(opened, Mapping) and "messages" in opened:
        record.update({**record.pop("input"), "prompt": opened["messages"]})
        record.pop("messages", None)
    dialogue = parsed_list(record.get("messages"))
    if "chosen" not in record and "rejected" in record and isinstance(dialogue, list):
        del record["messages"]
        record["chosen"], answer = dialogue, record["rejected"]
        before, turn = dialogue[:-1], {"role": "assistant", "content": answer}
        record["rejected"] = answer if isinstance(answer, list) else [*before, turn]
    if "prompt" not in record and "conversations" in record:
        record["prompt"] = parsed_list(record.pop("conversations"))
    for name in ("messages", "conversation"):
        if "prompt" in record or name not in record:
            continue
        turns = parsed_list(record[name])
        if isinstance(turns, list) and turns and _is_question(turns[-1]):
            del record[name]
            record["prompt"] = turns


def _is_question(turn: Any) -> bool:
    return isinstance(turn, Mapping) and role(turn) in ("user", "tool")


def _put_prompt(record: dict[str, Any]) -> None:
    if "system" not in record and isinstance(record.get("system_prompt"), str):
        record["system"] = record.pop("system_prompt")
    is_dialogue = any(isinstance(record.get(key), list) for key in ("chosen", "rejected"))
    if "prompt" not in record and "instruction" in record:
        question = [record.pop("instruction"), record.pop("input", None)]
        record["prompt"] = "\n\n".join(part for part in question if isinstance(part, str) and part.strip())
        _put_history(record)
    name = next((name for name in _PROMPTS if isinstance(record.get(name), str)), None)
    if "prompt" not in record and name is not None:
        record["prompt"] = record.pop(name)
    if isinstance(record.get("prompt"), str):
        record["prompt"] = _spoken(record["prompt"]) or record["prompt"]
    elif "prompt" not in record and not is_dialogue:
        _put_common_beginning(record)


def _put_history(record: dict[str, Any]) -> None:
    history = record.get("history")
    if isinstance(history, list) and history and all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        del record["history"]
        turns = [turn for pair in history for turn in zip(("user", "assistant"), pair, strict=True)]
        turns.append(("user", record["prompt"]))
        record["prompt"] = [{"role": speaker, "content": content} for speaker, content in turns]


def _put_common_beginning(record: dict[str, Any]) -> None:
    """Use what both texts begin with as the prompt, up to the last word that both complete."""
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return
    common = posixpath.commonprefix([chosen, rejected])
    end = max(common.rfind(blank) for blank in " \n") + 1
    if common[:end].strip():
        record["prompt"], record["chosen"], record["rejected"] = chosen[:end].rstrip(), chosen[end:], rejected[end:]


def _answer(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, str):
        turns = _spoken(value)
        return turns if turns is not None else parsed_list(value)
    return value


def _spoken(text: str) -> list[dict[str, Any]] | None:
    """Parse a dialogue of paragraphs that begin with "Human:" and "Assistant:", as in hh-rlhf."""
    if not text.lstrip().startswith("Human:"):
        return None
    parts = _SPEAKERS.split("\n\n" + text.lstrip())[1:]
    turns = [
        {"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns
