"""Renders turns with the chat template of a tokenizer, such that a rendering never changes.

A template may write today's date and pick at random. Here the date is that of the job, and what is
picked depends on the row alone, so a resumed run renders what the first attempt rendered.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from datetime import date as Date
from datetime import datetime, time
from typing import Any

from finetune_trainer import limits
from finetune_trainer.data.reading.row import Row, Turn

TEMPLATE_SECONDS = 5.0
"""How long a template, which is a program, may take for one text."""
_DATE = "strftime_now"
_RANDOM = re.compile(r"\|\s*random\b")


class TemplateRefusal(Exception):
    """Reports that a chat template refuses a row, for example because roles must alternate."""


def writes_date(template: str) -> bool:
    """Whether a chat template may write today's date."""
    return _DATE in template


class ChatTemplate:
    """Renders turns for one tokenizer. `date` is the day that a template writes, as YYYY-MM-DD;
    None means that of the clock."""

    def __init__(self, tokenizer: Any, date: str | None = None) -> None:
        self._apply = tokenizer.apply_chat_template
        templates = tokenizer.chat_template or ""
        self._templates = tuple(templates.values()) if isinstance(templates, dict) else (str(templates),)
        self._day = datetime.combine(Date.fromisoformat(date), time()) if date else None
        self._choice = random.Random()  # noqa: S311 (it keeps no secret)
        self._is_pinned = self.date is not None or self.picks_at_random

    @property
    def date(self) -> str | None:
        """The day that the template may write as today's date; None if it writes none, or if that
        day is the clock's."""
        if self._day is None or not any(map(writes_date, self._templates)):
            return None
        return self._day.date().isoformat()

    @property
    def picks_at_random(self) -> bool:
        """Whether the template picks something at random."""
        return any(_RANDOM.search(template) for template in self._templates)

    def render(self, turns: Sequence[Turn], row: Row, *, answer: bool = False) -> str:
        """Render turns with the tools of `row` and, with `answer`, what begins an answer.

        Raises TemplateRefusal.
        """
        chat = [
            {"role": turn.role, "content": turn.content, **(json.loads(turn.more) if turn.more else {})}
            for turn in turns
        ]
        tools = json.loads(row.tools) if row.tools else None
        if self._is_pinned:
            self._pin(row.number)
        try:
            with limits.seconds_at_most(TEMPLATE_SECONDS):
                return str(self._apply(chat, tools=tools, tokenize=False, add_generation_prompt=answer))
        except limits.Overrun as overrun:
            raise TemplateRefusal(overrun) from None
        except (ValueError, KeyError) as error:  # of Transformers itself: there is no template for tools
            raise TemplateRefusal(error) from None
        except Exception as error:  # a template is a program, so it may raise anything
            message = error if _is_template_error(error) else f"{type(error).__name__}: {error}"
            raise TemplateRefusal(message) from None

    def _pin(self, number: int) -> None:
        """Replace the clock and the chance of the compiled templates, which Transformers caches."""
        from transformers.utils import chat_template_utils

        self._choice.seed(number)
        for template in self._templates:
            compiled = chat_template_utils._compile_jinja_template(template)
            if self._day is not None:
                compiled.globals[_DATE] = self._day.strftime
            compiled.environment.filters["random"] = lambda _, values: self._choice.choice(values)


def _is_template_error(error: Exception) -> bool:
    """Whether the template itself raised the error, so that its message is meant for people."""
    from jinja2.exceptions import TemplateError

    return isinstance(error, TemplateError)
