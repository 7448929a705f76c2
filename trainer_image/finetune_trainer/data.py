"""The rows of a run as splits of tokens: rendered once a node, mapped by all its ranks. Called by `story`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from finetune_api.run import RunConfig
from finetune_trainer import rows, split, tokens
from finetune_trainer.failure import Failed
from finetune_trainer.paths import Paths
from finetune_trainer.render import Renderer
from finetune_trainer.reporter import Reporter
from finetune_trainer.split import Split
from finetune_trainer.world import World

_FIELD = {"train": "dataset.uri", "validation": "dataset.validation.uri", "test": "dataset.test.uri"}


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
    renderer = Renderer.load(paths.model, run.data.max_sequence_length)
    reporter.decision("rendering", *renderer.rule)
    names = {
        name: _key(run, paths, name)
        for name, place in (
            ("train", run.data.train),
            ("validation", run.data.validation),
            ("test", run.data.test),
        )
        if place is not None
    }
    if world.is_first_of_node:
        for name, key in names.items():
            tokens.build(
                paths.token_cache,
                key,
                paths.data(name),
                _FIELD[name],
                format=run.data.format,
                on_invalid=run.data.on_invalid,
                renderer=renderer,
                alive=reporter.alive,
            )
    world.wait()
    loaded = {name: tokens.load(paths.token_cache, key) for name, key in names.items()}
    _say(loaded["train"], reporter)
    train, validation = split.whole(loaded["train"]), None
    if "validation" in loaded:
        validation = split.whole(loaded["validation"])
    elif run.data.validation_fraction is not None:
        train, validation = split.held_out(loaded["train"], run.training.seed, run.data.validation_fraction)
    test = split.whole(loaded["test"]) if "test" in loaded else None
    keys = "/".join(names[name] for name in ("train", "validation") if name in names)
    return Data(
        train,
        validation,
        test,
        _samples(run, paths, test) if test is not None else (),
        renderer,
        hashlib.sha256(keys.encode()).hexdigest()[:32],
        loaded["train"].facts.dropped,
    )


def _key(run: RunConfig, paths: Paths, name: str) -> str:
    path = paths.data(name)
    if not path.is_file():
        raise Failed("DatasetNotFound", f"{_FIELD[name]}: no file was fetched; give the URI of one JSON-lines file")
    return tokens.key(
        path,
        paths.model,
        max_length=run.data.max_sequence_length,
        format=run.data.format,
        on_invalid=run.data.on_invalid,
    )


def _samples(run: RunConfig, paths: Paths, test: Split) -> tuple[rows.Row, ...]:
    """As many usable test rows as are wanted, from the whole file evenly: a file may be sorted."""
    wanted = min(run.evaluation.answered, len(test))
    if wanted == 0:
        return ()
    numbers = {test.line(index * len(test) // wanted) for index in range(wanted)}
    return tuple(row for row in rows.read(paths.data("test"), run.data.format).rows if row.number in numbers)


def _say(train: tokens.Tokens, reporter: Reporter) -> None:
    facts = train.facts
    found = [f"{len(train)} rows of format {facts.format}"]
    for count, what in ((facts.dropped, "dropped"), (facts.duplicates, "duplicates"), (facts.truncated, "cut")):
        if count:
            found.append(f"{count} {what}")
    reporter.decision("rows", ", ".join(found), f"read from {_FIELD['train']}")
