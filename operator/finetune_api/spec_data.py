"""spec.dataset: the examples to learn from, in the words of their files. Put together in `resource`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.model import Model, Rule
from finetune_api.spec_inputs import SecretRef
from finetune_api.spec_rules import clean_uri, fraction_or_uri, reachable

DataFormat = Literal[
    "auto", "prompt-completion", "messages", "preference", "text", "alpaca", "sharegpt", "label-studio", "snorkel"
]  # fmt: skip
_Column = Annotated[str, Field(min_length=1, max_length=128)]
_FORMATS = "; ".join(
    (
        "prompt-completion: prompt and completion, two strings or two lists of turns",
        "messages: turns with role and content, and tools",
        "text: all of it is learnt",
        "alpaca: instruction, input, output",
        "sharegpt: conversations of from and value; preference: chosen and rejected, for objective dpo",
        "label-studio: its exports JSON, JSON-MIN and CSV",
        "snorkel: a text with its label or its probabilities",
    )
)


class ColumnsSpec(Model):
    """What the file calls a key that we call otherwise: `{prompt: question, completion: answer}`."""

    prompt: _Column | None = Field(default=None, description="Key of the prompt.")
    completion: _Column | None = Field(default=None, description="Key of the answer, or of the label.")
    messages: _Column | None = Field(default=None, description="Key of the list of turns.")
    role: _Column | None = Field(default=None, description="Within a turn: key of its role.")
    content: _Column | None = Field(default=None, description="Within a turn: key of its text.")
    system: _Column | None = Field(default=None, description="Key of a system prompt beside the turns.")
    tools: _Column | None = Field(default=None, description="Key of the list of functions that may be called.")
    text: _Column | None = Field(default=None, description="Key of a text that is learnt whole.")
    instruction: _Column | None = Field(default=None, description="Alpaca: key of the instruction.")
    input: _Column | None = Field(default=None, description="Alpaca: key of the instruction's input.")
    output: _Column | None = Field(default=None, description="Alpaca: key of the answer.")
    history: _Column | None = Field(default=None, description="Alpaca: key of earlier [instruction, output] pairs.")
    conversations: _Column | None = Field(default=None, description="ShareGPT: key of the list of turns.")
    probabilities: _Column | None = Field(default=None, description="Snorkel: key of the classes' probabilities.")

    def named(self) -> dict[str, str]:
        """Our name → the file's, of those that are given."""
        return {name: column for name, column in self if column is not None}


class SourceSpec(Model):
    """One of several places that training rows come from."""

    uri: s.DataUri = Field(description="A file, a folder or a pattern, as dataset.uri.")
    weight: float = Field(
        default=1.0, gt=0, le=100,
        description="How often a row of it is seen in an epoch: 2 is twice, 0.25 is every fourth row (always the same "
        "ones, chosen by content).",
    )  # fmt: skip
    format: DataFormat | None = Field(default=None, description="Of its rows. Empty means dataset.format.")
    columns: ColumnsSpec | None = Field(default=None, description="Of its files. Empty means dataset.columns.")

    rules = (clean_uri(), reachable())


class ValidationSpec(Model):
    """Rows that are never trained on, used for the eval loss during training: a share, or a file of their own."""

    fraction: float | None = Field(
        default=None, gt=0, lt=0.5,
        description="Share of the training rows that is held out, chosen by their content: a row stays where it is "
        "when others are added, and equal rows stay together. More than 0, less than 0.5.",
    )  # fmt: skip
    uri: s.DataUri | None = Field(default=None, description="Held-out rows, read like dataset.uri.")

    rules = (fraction_or_uri(), clean_uri(), reachable())


class TestSpec(Model):
    """Rows that decide nothing: their loss is reported before and after training. A share, or a file of their own."""

    __test__ = False  # not a pytest class

    fraction: float | None = Field(
        default=None, gt=0, lt=0.5,
        description="Share of the training rows that is held out, chosen by their content as validation's; no row is "
        "in both. More than 0, less than 0.5.",
    )  # fmt: skip
    uri: s.DataUri | None = Field(default=None, description="Test rows, read like dataset.uri.")

    rules = (fraction_or_uri(), clean_uri(), reachable())


class DatasetSpec(Model):
    """The examples to learn from."""

    uri: s.DataUri | None = Field(
        default=None,
        description="Where the rows lie: s3://bucket/key, pvc://claim/path or hf://owner/dataset/file. A file, a "
        "folder (with / at its end) or a pattern (data/*.jsonl.gz). JSON lines, a JSON array, CSV or parquet; gzip, "
        "zstd, bz2 or xz.",
    )
    sources: Annotated[tuple[SourceSpec, ...], Field(max_length=32)] = Field(
        default=(), description="Several places instead of uri, each with a weight: a mixture."
    )
    credentials_ref: SecretRef | None = Field(
        default=None, description="Secret with the credentials for the data set's URIs."
    )
    format: DataFormat = Field(
        default="auto",
        description=f"Shape of a row. auto recognises it by the first row's keys, and says what it took. {_FORMATS}.",
    )
    columns: ColumnsSpec | None = Field(
        default=None, description="The files' own names of keys, where they are other than the format's."
    )
    labels: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=1000)] = Field(
        default=(), description="Snorkel: the words for its classes 0, 1, … which are what is learnt."
    )
    min_label_probability: float = Field(
        default=0.0, ge=0, le=1,
        description="Snorkel: a row whose likeliest class is less probable than this is left out and counted, as one "
        "where the label model abstains (-1, a tie). 0.7 keeps what is sure.",
    )  # fmt: skip
    chat_template: str | None = Field(
        default=None, min_length=1, max_length=32768,
        description="Chat template (Jinja) instead of the tokenizer's: its text, or the name of a .jinja file in the "
        "model's folder. It is checked before the run, and written with the result.",
    )  # fmt: skip
    validation: ValidationSpec | None = Field(default=None, description="Held-out rows for the eval loss.")
    test: TestSpec | None = Field(default=None, description="Held-out rows, measured before and after training.")
    max_sequence_length: int = Field(
        default=2048, ge=8, le=1048576,
        description="Longest row, in tokens. A longer row's completion is cut at the end; a row whose prompt alone "
        "is that long has nothing left to learn and is treated by onInvalid.",
    )  # fmt: skip
    packing: bool = Field(
        default=True,
        description="Put several short rows into one sequence, so that little padding is computed. No row sees "
        "another one, so the loss is the same.",
    )
    shared_prefix: Literal["auto", "off"] = Field(
        default="auto",
        description="Compute what rows of one sequence begin with alike (an instruction, a system prompt) once for all "
        "of them; loss and gradients stay the same. auto does so where it saves work. Needs packing.",
    )
    on_invalid: Literal["fail", "drop"] = Field(
        default="fail",
        description="What happens to a row that can't be used: fail stops before training and names the rows, drop "
        "leaves them out and counts them.",
    )

    rules = (
        Rule("uri", "give either uri or sources, exactly one", "has(self.uri) != (self.sources.size() > 0)",
             lambda m: (m.uri is None) != (not m.sources)),
        clean_uri(),
        reachable(),
        Rule("chatTemplate", "must be the text of a Jinja template, or the name of a .jinja file",
             "!has(self.chatTemplate) || self.chatTemplate.contains('{')"
             " || self.chatTemplate.matches('^[A-Za-z0-9][A-Za-z0-9._-]*[.]jinja$')",
             lambda m: m.chat_template is None or "{" in m.chat_template
             or s.is_file_name(m.chat_template, ".jinja")),
    )  # fmt: skip

    def places(self) -> tuple[SourceSpec, ...]:
        """Where training rows come from, whichever way it is written; format and columns resolved."""
        given = self.sources or ((SourceSpec(uri=self.uri),) if self.uri else ())
        return tuple(
            source.model_copy(
                update={"format": source.format or self.format, "columns": source.columns or self.columns}
            )
            for source in given
        )
