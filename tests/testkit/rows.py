"""Rows for tests: prompts and completions of mixed lengths, the same in every run."""

from __future__ import annotations

_WORDS = "define the noun wander tower light ship fox quick lazy dog again aim move about".split()  # noqa: SIM905


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return prompts and completions of mixed lengths, all different."""
    made = []
    for index in range(count):
        at = index + seed * 1000
        prompt = " ".join(_WORDS[(at * 7 + k) % len(_WORDS)] for k in range(1 + at % 5))
        answer = " ".join(_WORDS[(at * 5 + 3 * k) % len(_WORDS)] for k in range(1 + (at * 3) % 9))
        made.append({"prompt": f"{at}: {prompt}?", "completion": f" {answer}."})
    return made
