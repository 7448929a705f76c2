"""Defines spec.dataset.rendering: what of a row is trained on, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune_api.base import Model

# Every day of 2000 to 2099 that exists.
_DATE = (
    "^20[0-9]{2}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    "|02-(0[1-9]|1[0-9]|2[0-8]))$|^20([02468][048]|[13579][26])-02-29$"
)


class RenderingSpec(Model):
    """Specifies how the turns of rows are rendered and which of them are trained on."""

    date: str | None = Field(
        default=None, pattern=_DATE,
        description="The day, as YYYY-MM-DD, that a chat template writes as today's date. Empty means the day on "
        "which the job was created (UTC). It stays the same for all pods and restarts.",
    )  # fmt: skip
    answers: Literal["all", "last"] = Field(
        default="all",
        description="Which answers of a dialogue are trained on. An answer that the chat template renders differently "
        "once others follow becomes an example of its own, rendered as at inference. A turn's weight of 0 leaves it "
        "out in any case.",
    )
    reasoning: Literal["train", "mask", "remove"] = Field(
        default="train",
        description="What happens to the reasoning of an answer, which is its reasoning_content or a <think> block: "
        "train trains on it if the chat template writes it, mask shows it without training on it, and remove deletes "
        "it from the rows.",
    )
    open_turns: Literal["refuse", "cut"] = Field(
        default="refuse",
        description="What happens to a dialogue that ends with a question or begins with an answer: refuse makes the "
        "row unusable (see onInvalid), and cut removes these turns and counts them.",
    )
    whitespace: Literal["keep", "strip"] = Field(
        default="keep",
        description="What happens to spaces and line breaks at the beginning and the end of texts: keep leaves them "
        "to the chat template and counts the answers that have them, strip removes them.",
    )
    control_tokens: Literal["keep", "refuse", "encode"] = Field(
        default="keep",
        description="What happens to rows whose texts contain control tokens such as <|im_end|>, which look like the "
        "border of a turn: keep counts them and leaves them, refuse makes the row unusable (see onInvalid), and encode "
        "makes them plain text, which can't end or begin a turn.",
    )

    def of_job(self, created: str | None) -> RenderingSpec:
        """Returns the same with a date: by default the day on which the job was created, as a
        timestamp."""
        return self.model_copy(update={"date": self.date or (created[:10] if created else None)})
