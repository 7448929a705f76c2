"""Turns files of rows into splits of tokens and their data report.

Preflight, the ranks and `finetune validate --data` all read rows this way, so they accept and
report the same. The module doesn't import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune_api.messages.data_report import DataReport, SplitName
from finetune_api.messages.run import DataConfig, RunConfig
from finetune_trainer import refusals
from finetune_trainer.data import preparation, quality_report, sources, template_checks, token_cache
from finetune_trainer.data.chat_rendering import Renderer
from finetune_trainer.data.preparation import ReadOptions
from finetune_trainer.data.reading.preference_rows import FORMAT
from finetune_trainer.data.reading.rows import InputFile
from finetune_trainer.data.rendering.chat_template import writes_date
from finetune_trainer.data.row_statistics import RowStatistics
from finetune_trainer.data.splits import SplitRows, split_rows
from finetune_trainer.data.token_cache import Tokens
from finetune_trainer.data.tokenizer import chat_template, own_templates
from finetune_trainer.errors import RunError
from finetune_trainer.model_folder import RowNeeds
from finetune_trainer.paths import Paths


class Group(Protocol):
    """Describes processes that read rows together; `parallel.world.World` is one."""

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of the group."""
        ...

    @property
    def is_first_of_node(self) -> bool:
        """Whether this is the first process of its node."""
        ...

    def barrier(self) -> None:
        """Wait until every process of the group has called it."""


class _OneProcess:
    """Stands for a single process, which never waits."""

    is_first = is_first_of_node = True

    def barrier(self) -> None:
        """Return immediately."""


@dataclass(frozen=True)
class Inputs:
    """Names the files of each split, and where their tokens are cached.

    `fields` are what messages call the files of a split: a field of the spec or a command-line
    option. `cache_names` are the folders of `cache` that hold a split's tokens.
    """

    config: DataConfig
    files: Mapping[SplitName, tuple[InputFile, ...]]
    fields: Mapping[SplitName, str]
    cache: Path
    cache_names: Mapping[SplitName, str]

    @classmethod
    def of_run(cls, run: RunConfig, paths: Paths) -> Inputs:
        """Return the downloaded files of a run. Raises RunError DatasetNotFound without any."""
        names = sources.splits(run.data)
        files = {name: sources.of(run.data, paths, name) for name in names}
        return cls(
            run.data,
            files,
            {name: sources.field(run.data, name) for name in names},
            paths.token_cache,
            {name: _cache_name(run, paths, files[name]) for name in names},
        )


@dataclass(frozen=True)
class PreparedRows:
    """Holds splits of rows. Only the first process of a node knows `template_checks`."""

    config: DataConfig
    renderer: Renderer | None
    template_checks: tuple[str, ...]
    rows: Mapping[SplitName, RowStatistics]
    splits: Mapping[SplitName, SplitRows]
    fields: Mapping[SplitName, str]

    def check_objective(self, objective: str) -> None:
        """Check that the rows fit the objective. Raises RunError DatasetInvalid."""
        files = (file for rows in self.rows.values() for file in rows.files)
        check_objective({file.format for file in files if file.format}, objective)

    def needs(self) -> tuple[RowNeeds, ...]:
        """Return what each split needs of a model; nothing is known without a renderer."""
        return tuple(
            needs(rows.tokens, self.renderer, self.fields[name])
            for name, rows in self.rows.items()
            if rows.tokens is not None and self.renderer is not None
        )

    def report(self) -> DataReport:
        """Return the data report of these rows."""
        return quality_report.report(
            self.splits,
            max_length=self.config.max_sequence_length,
            renderer=self.renderer,
            template_checks=self.template_checks,
        )


def check_objective(formats: Collection[str], objective: str) -> None:
    """Check that rows of these formats fit the objective. Raises RunError DatasetInvalid."""
    if objective == "supervised" and FORMAT in formats:
        raise RunError(
            "DatasetInvalid",
            "dataset.uri: the rows have chosen and rejected answers; set training.objective: dpo, or give one answer",
        )
    if objective == "dpo" and set(formats) != {FORMAT}:
        raise RunError("DatasetInvalid", "dataset.uri: objective dpo needs rows with prompt, chosen and rejected")


def load_renderer(folder: Path, config: DataConfig, added: tuple[str, ...] = ()) -> Renderer:
    """Load the tokenizer of a model's folder, with the chat template and the `added` tokens of a
    run.

    Raises RunError ModelInvalid or InvalidConfig if one of them can't be used.
    """
    import transformers  # noqa: F401  # its absence isn't the model's fault

    remedy = "use the tokenizer files that were published with the model"
    with refusals.raising("ModelInvalid", "model.uri: the tokenizer can't be used", remedy):
        return Renderer.load(folder, config.max_sequence_length, config.chat_template, added, config.rendering)


def needs(tokens: Tokens, renderer: Renderer, field: str) -> RowNeeds:
    """Return what rows need of a model. `field` is what messages call them.

    The row of a preference pair holds two answers, each of which is computed on its own.
    """
    longest = min(int(tokens.lengths.max()), renderer.max_length)
    highest = int(tokens.ids.max())
    if not renderer.encoder_decoder:
        return RowNeeds(highest, 0, longest, field)
    rests = tokens.lengths - tokens.sources
    return RowNeeds(highest, int(tokens.sources.max()), min(longest, int(rests.max())), field)


def prepare(
    inputs: Inputs,
    renderer: Renderer | None,
    group: Group | None = None,
    heartbeat: Callable[[], None] = lambda: None,
    opened: Callable[[str], None] = lambda file: None,
) -> PreparedRows:
    """Check the chat template, render the rows, cache their tokens, and split them.

    All processes of `group` call it together. The first process of a node fills the cache, and the
    others map it into memory. Without a renderer nothing is cached, and lengths are characters.

    `heartbeat` and `opened` are as in ReadOptions.

    Raises RunError DatasetInvalid with the numbers of unusable rows if dataset.onInvalid is fail,
    and ModelInvalid or InvalidConfig for a template.
    """
    group = group or _OneProcess()
    config = inputs.config
    checks: tuple[str, ...] = ()
    options = {
        name: ReadOptions(inputs.fields[name], renderer, config.on_invalid, heartbeat, opened) for name in inputs.files
    }
    if renderer is None:
        rows = {
            name: RowStatistics.of_examples(preparation.prepare(files, options[name]))
            for name, files in inputs.files.items()
        }
    else:
        if group.is_first_of_node:
            checks = template_checks.check_template(renderer, own=config.chat_template is None)
            for name, files in inputs.files.items():
                token_cache.build(inputs.cache, inputs.cache_names[name], files, options[name])
        group.barrier()
        rows = {
            name: RowStatistics.of_tokens(token_cache.load(inputs.cache, inputs.cache_names[name]))
            for name in inputs.files
        }
    splits = split_rows(rows, config.validation_fraction, config.test_fraction)
    return PreparedRows(config, renderer, checks, rows, splits, inputs.fields)


def _cache_name(run: RunConfig, paths: Paths, files: tuple[InputFile, ...]) -> str:
    template = chat_template(paths.model, run.data.chat_template)
    depends_on_date = any(map(writes_date, (template,) if template is not None else own_templates(paths.model)))
    rendering = run.data.rendering if depends_on_date else run.data.rendering.model_copy(update={"date": None})
    return token_cache.key(
        files,
        paths.model,
        max_length=run.data.max_sequence_length,
        on_invalid=run.data.on_invalid,
        chat_template=template,
        rendering=rendering.to_json(),
        **({"added": run.added_tokens} if run.added_tokens else {}),
    )
