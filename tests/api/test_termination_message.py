"""A result fits into a termination message, whatever it contains."""

from __future__ import annotations

import pytest

from finetune_api.messages.result import LIMIT_BYTES, Result, decode, encode

_LINE = "  File supervisor.py, line 69, in run\n"


@pytest.mark.parametrize("lines", [1, 40, 60, 500])
@pytest.mark.parametrize("message", ["short", "long " * 1000, "ü" * 5000])
def test_a_result_fits_and_its_log_keeps_its_last_lines_whole(lines: int, message: str) -> None:
    text = encode(Result(outcome="failed", reason="TrainingError", message=message, log_tail=_LINE * lines + "end\n"))
    assert len(text.encode()) <= LIMIT_BYTES
    result = decode(text)
    assert result is not None
    assert message.startswith(result.message)
    first, *_, last = result.log_tail.splitlines()
    assert first + "\n" == _LINE
    assert last == "end"


def test_one_endless_line_is_cut() -> None:
    result = decode(encode(Result(outcome="failed", log_tail="x" * 100_000)))
    assert result is not None
    assert result.log_tail == "x" * 2000
