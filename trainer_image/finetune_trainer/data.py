"""The rows of a run as splits of tokens: rendered once a node, mapped by all its ranks. Called by `story`.

Rank 0 writes the data report before anything is trained.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_api import events
from finetune_api.data_report import SplitName
from finetune_api.run import RunConfig
from finetune_trainer import certify, examples, inputs, rows, survey, tokens
from finetune_trainer.paths import Paths
from finetune_trainer.render import Renderer
from finetune_trainer.reporter import Reporter
from finetune_trainer.split import Split
from finetune_trainer.tokenizer_files import chat_template

if TYPE_CHECKING:  # preflight computes the data report without torch
    from finetune_trainer.world import World


@dataclass(frozen=True)
class Data:
    """`key` names the content of train and validation rows; `samples` are the test rows that are answered."""

    train: Split
    validation: Split | None
    test: Split | None
    samples: tuple[rows.Row, ...]
    renderer: Renderer
    key: str
    dropped: int

    @property
    def longest(self) -> int:
        """Tokens of the longest row of any split."""
        splits = (split for split in (self.train, self.validation, self.test) if split is not None)
        return max(int(split.lengths.max()) for split in splits)

    @property
    def highest(self) -> int:
        """The largest token number in any split's file."""
        splits = (split for split in (self.train, self.validation, self.test) if split is not None)
        return max(int(split.tokens.ids.max()) for split in splits)


def read(run: RunConfig, paths: Paths, world: World, reporter: Reporter) -> Data:
    """Raises Failed DatasetInvalid that numbers the rows. All ranks of a node wait for the first."""
    renderer = Renderer.load(paths.model, run.data.max_sequence_length, run.data.chat_template, run.added_tokens)
    reporter.decision("rendering", *renderer.rule)
    given = {name: inputs.of(run.data, paths, name) for name in inputs.splits(run.data)}
    names = {name: key(run, paths, files) for name, files in given.items()}
    checks: tuple[str, ...] = ()
    if world.is_first_of_node:
        checks = certify.certify(renderer, own=run.data.chat_template is None)
        for name, files in given.items():
            tokens.build(
                paths.token_cache,
                names[name],
                files,
                inputs.field(run.data, name),
                on_invalid=run.data.on_invalid,
                renderer=renderer,
                alive=reporter.alive,
            )
    world.wait()
    loaded = {name: tokens.load(paths.token_cache, key) for name, key in names.items()}
    _say(loaded["train"], inputs.field(run.data, "train"), reporter)
    surveyed = parts_of(run, loaded)
    parts = {name: Split(loaded.get(name, loaded["train"]), one.index) for name, one in surveyed.items()}
    if world.is_first:
        _report(surveyed, run, paths, renderer, checks, reporter)
    keys = "/".join(names[name] for name in ("train", "validation") if name in names)
    return Data(
        parts["train"],
        parts.get("validation"),
        parts.get("test"),
        _samples(run, given, parts),
        renderer,
        hashlib.sha256(keys.encode()).hexdigest()[:32],
        loaded["train"].facts.dropped,
    )


def parts_of(run: RunConfig, loaded: dict[SplitName, tokens.Tokens]) -> dict[SplitName, survey.Part]:
    """Train, validation and test, from files of their own or held out of the training files."""
    measured = {name: survey.Measured.of_tokens(one) for name, one in loaded.items()}
    return survey.parts_of(measured, run.data.validation_fraction, run.data.test_fraction)


def _report(
    parts: dict[SplitName, survey.Part],
    run: RunConfig,
    paths: Paths,
    renderer: Renderer,
    checks: tuple[str, ...],
    reporter: Reporter,
) -> None:
    found = survey.report(parts, longest=run.data.max_sequence_length, renderer=renderer, checks=checks)
    paths.data_report.write_text(found.model_dump_json(by_alias=True, exclude_none=True))
    reporter.report(events.DataEvent, path=str(paths.data_report), data=survey.summary(found))


def key(run: RunConfig, paths: Paths, files: tuple[rows.Input, ...]) -> str:
    return tokens.key(
        files,
        paths.model,
        max_length=run.data.max_sequence_length,
        on_invalid=run.data.on_invalid,
        chat_template=chat_template(paths.model, run.data.chat_template),
        **({"added": run.added_tokens} if run.added_tokens else {}),
    )


def _samples(
    run: RunConfig, given: dict[SplitName, tuple[rows.Input, ...]], parts: dict[SplitName, Split]
) -> tuple[rows.Row, ...]:
    """As many usable test rows as are wanted, of all of them evenly: a file may be sorted. A text asks nothing."""
    test = parts.get("test")
    wanted = min(run.evaluation.answered, len(test)) if test is not None else 0
    if wanted == 0 or test is None:
        return ()
    name: SplitName = "test" if "test" in given else "train"
    rows_at = [int(test.index[index * len(test) // wanted]) for index in range(wanted)]
    places = {(int(test.tokens.origins[row]), int(test.tokens.numbers[row])) for row in rows_at}
    found = examples.chosen(given[name], inputs.field(run.data, name), places)
    return tuple(row for row in found if not row.is_text)


def _say(train: tokens.Tokens, where: str, reporter: Reporter) -> None:
    facts = train.facts
    found = [f"{len(train)} rows of format {facts.format}"]
    for count, what in ((facts.dropped, "dropped"), (facts.duplicates, "duplicates"), (facts.truncated, "cut")):
        if count:
            found.append(f"{count} {what}")
    reporter.decision("rows", ", ".join(found), f"read from {where}")
