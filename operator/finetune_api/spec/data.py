"""Defines spec.dataset: where the training examples are stored and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api import scalars as s
from finetune_api.base import Model, Rule
from finetune_api.spec.inputs import SecretRef
from finetune_api.spec.rendering import RenderingSpec
from finetune_api.spec.rules import clean_uri, fraction_or_uri

DataFormat = Literal[
    "auto", "prompt-completion", "messages", "preference", "text", "alpaca", "sharegpt", "label-studio", "snorkel"
]  # fmt: skip
_Column = Annotated[str, Field(min_length=1, max_length=128)]
_LABEL_CHARACTERS = 65536  # a job has to fit into etcd together with its status
_FORMATS = "; ".join(
    (
        "prompt-completion: prompt and completion, two strings or two lists of turns",
        "messages: turns with role and content, and tools",
        "text: every token is trained on",
        "alpaca: instruction, input, output",
        "sharegpt: conversations of from and value; preference: chosen and rejected, for objective dpo",
        "label-studio: the exports of Label Studio (JSON, JSON-MIN, CSV)",
        "snorkel: a text with its label or its class probabilities",
    )
)


class ColumnsSpec(Model):
    """Maps the key names used here to those in the files.

    An example is `{prompt: question, completion: answer}`.
    """

    prompt: _Column | None = Field(default=None, description="Key of the prompt.")
    completion: _Column | None = Field(default=None, description="Key of the answer, or of the label.")
    messages: _Column | None = Field(default=None, description="Key of the list of turns.")
    role: _Column | None = Field(default=None, description="Key of the role within a turn.")
    content: _Column | None = Field(default=None, description="Key of the text within a turn.")
    system: _Column | None = Field(default=None, description="Key of a system prompt next to the turns.")
    tools: _Column | None = Field(default=None, description="Key of the list of functions that the model may call.")
    text: _Column | None = Field(default=None, description="Key of a text of which every token is trained on.")
    instruction: _Column | None = Field(default=None, description="Alpaca: key of the instruction.")
    input: _Column | None = Field(default=None, description="Alpaca: key of the instruction's input.")
    output: _Column | None = Field(default=None, description="Alpaca: key of the answer.")
    history: _Column | None = Field(default=None, description="Alpaca: key of earlier [instruction, output] pairs.")
    conversations: _Column | None = Field(default=None, description="ShareGPT: key of the list of turns.")
    probabilities: _Column | None = Field(default=None, description="Snorkel: key of the class probabilities.")

    def named(self) -> dict[str, str]:
        """Returns the columns that are set: the name used here → the name in the files."""
        return {name: column for name, column in self if column is not None}


class SourceSpec(Model):
    """Specifies one of several sources of training rows."""

    uri: s.DataUri = Field(description="A file, a folder or a glob pattern, as in dataset.uri.")
    weight: float = Field(
        default=1.0, gt=0, le=100,
        description="How often each of its rows is trained on per epoch: 2 is twice; 0.25 uses a quarter of the rows "
        "(always the same ones, selected by content).",
    )  # fmt: skip
    format: DataFormat | None = Field(default=None, description="Format of its rows. Empty means dataset.format.")
    columns: ColumnsSpec | None = Field(
        default=None, description="Key names in its files. Empty means dataset.columns."
    )

    rules = (clean_uri(),)


class ValidationSpec(Model):
    """Specifies the rows for the validation loss during training; they are never trained on. They
    are a fraction of the training rows, or files of their own."""

    fraction: float | None = Field(
        default=None, gt=0, lt=0.5,
        description="Fraction of the training rows to hold out, selected by content: a row stays in its split when "
        "other rows are added, and identical rows stay together. More than 0, less than 0.5.",
    )  # fmt: skip
    uri: s.DataUri | None = Field(default=None, description="Validation rows, read like dataset.uri.")

    rules = (fraction_or_uri(), clean_uri())


class TestSpec(Model):
    """Specifies rows that never influence training; their loss is reported before and after it.
    They are a fraction of the training rows, or files of their own."""

    __test__ = False  # not a pytest class

    fraction: float | None = Field(
        default=None, gt=0, lt=0.5,
        description="Fraction of the training rows to hold out, selected by content as for validation; no row is in "
        "both splits. More than 0, less than 0.5.",
    )  # fmt: skip
    uri: s.DataUri | None = Field(default=None, description="Test rows, read like dataset.uri.")

    rules = (fraction_or_uri(), clean_uri())


class DatasetSpec(Model):
    """Specifies the training examples."""

    uri: s.DataUri | None = Field(
        default=None,
        description="Location of the rows: s3://bucket/key, gs://bucket/key, az://container/key, pvc://claim/path, "
        "volume://name/path or hf://owner/dataset/file. A file, a folder (with a trailing /) or a glob pattern "
        "(data/*.jsonl.gz). JSON lines, a JSON array, CSV or Parquet; uncompressed or in gzip, zstd, bz2 or xz.",
    )
    sources: Annotated[tuple[SourceSpec, ...], Field(max_length=32)] = Field(
        default=(), description="Several sources instead of uri, each with a weight: a mixture."
    )
    credentials_ref: SecretRef | None = Field(
        default=None, description="Secret with the credentials for all URIs of the dataset."
    )
    format: DataFormat = Field(
        default="auto",
        description=f"Format of the rows. auto recognizes it by the keys of the first row and reports it. {_FORMATS}.",
    )
    columns: ColumnsSpec | None = Field(
        default=None, description="Key names in the files, if they differ from those of the format."
    )
    labels: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=1000)] = Field(
        default=(), description="Snorkel: the names of classes 0, 1, …; these are the answers to train on."
    )
    min_label_probability: float = Field(
        default=0.0, ge=0, le=1,
        description="Snorkel: a row whose most likely class is less probable than this is left out and counted, like "
        "a row on which the label model abstains (-1, or a tie). 0.7 keeps confident labels only.",
    )  # fmt: skip
    chat_template: str | None = Field(
        default=None, min_length=1, max_length=32768,
        description="Chat template (Jinja) to use instead of the tokenizer's: its text, or the name of a .jinja file "
        "in the model's folder. It is checked before the run and written with the result. none trains on prompts and "
        "completions as they are, for rows that were rendered already. Empty means the tokenizer's own.",
    )  # fmt: skip
    rendering: RenderingSpec = Field(
        default_factory=RenderingSpec, description="What of a row is trained on, where users want different things."
    )
    validation: ValidationSpec | None = Field(default=None, description="Held-out rows for the validation loss.")
    test: TestSpec | None = Field(default=None, description="Held-out rows, measured before and after training.")
    max_sequence_length: int = Field(
        default=2048, ge=8, le=1048576,
        description="Maximum length of a row, in tokens. The completion of a longer row is truncated; a row whose "
        "prompt alone is that long has nothing left to train on and is handled according to onInvalid.",
    )  # fmt: skip
    packing: bool = Field(
        default=True,
        description="Pack several short rows into one sequence, so that little padding is computed. Rows never "
        "attend to one another, so the loss is the same.",
    )
    shared_prefix: Literal["auto", "off"] = Field(
        default="auto",
        description="Compute a prefix that several rows of a sequence have in common (an instruction, a system prompt) "
        "only once; loss and gradients stay the same. auto does so if it saves work. Needs packing.",
    )
    on_invalid: Literal["fail", "drop"] = Field(
        default="fail",
        description="What to do with rows that can't be used: fail ends the job before training and lists the rows; "
        "drop leaves them out and counts them.",
    )

    rules = (
        Rule("uri", "exactly one of uri and sources must be set", "has(self.uri) != (self.sources.size() > 0)",
             lambda m: (m.uri is None) != (not m.sources)),
        clean_uri(),
        Rule("labels", f"must have at most {_LABEL_CHARACTERS} characters in all",
             f"self.labels.join('').size() <= {_LABEL_CHARACTERS}",
             lambda m: sum(map(len, m.labels)) <= _LABEL_CHARACTERS),
        Rule("chatTemplate", "must be the text of a Jinja template, the name of a .jinja file, or none",
             "!has(self.chatTemplate) || self.chatTemplate == 'none' || self.chatTemplate.contains('{')"
             " || self.chatTemplate.matches('^[A-Za-z0-9][A-Za-z0-9._-]*[.]jinja$')",
             lambda m: m.chat_template in (None, "none") or "{" in m.chat_template
             or s.is_file_name(m.chat_template, ".jinja")),
        Rule("rendering.controlTokens", "can't be encode with chatTemplate none, because the control tokens of rows "
             "that were rendered already must stay",
             "!has(self.chatTemplate) || self.chatTemplate != 'none' || !has(self.rendering)"
             " || self.rendering.controlTokens != 'encode'",
             lambda m: m.chat_template != "none" or m.rendering.control_tokens != "encode"),
    )  # fmt: skip

    def training_sources(self) -> tuple[SourceSpec, ...]:
        """Returns the sources of the training rows, with format and columns resolved."""
        sources = self.sources or ((SourceSpec(uri=self.uri),) if self.uri else ())
        return tuple(
            source.model_copy(
                update={"format": source.format or self.format, "columns": source.columns or self.columns}
            )
            for source in sources
        )
