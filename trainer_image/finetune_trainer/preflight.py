"""The checks before hardware is spent: destination, model, data. `python -m finetune_trainer preflight` runs them
all in a pod without GPU; the supervisor runs the cheap ones before it starts the ranks. Never loads weights.
"""

from __future__ import annotations

import json

from finetune_api.result import Result
from finetune_api.run import RunConfig
from finetune_api.status import ModelStatus
from finetune_trainer import destination, fetch, rows
from finetune_trainer.destination import Destination
from finetune_trainer.failure import Failed
from finetune_trainer.fetch import Told
from finetune_trainer.paths import Paths
from finetune_trainer.place import Place
from finetune_trainer.store import Access, open_folder

FIELDS = {"train": "dataset.uri", "validation": "dataset.validation.uri", "test": "dataset.test.uri"}


def check(run: RunConfig, paths: Paths, access: Access, told: Told) -> Result:
    """Everything but the weights. Raises Failed with the field, the value and the remedy."""
    told(f"checking the destination {run.output.display}")
    _, there = check_destination(run, access, write=True)
    if there.finished is not None:
        return Result(outcome="succeeded", message="the result is there already")
    model = fetch.model(run, paths, access, told, weights=False)
    fetch.data(run, paths, access, told)
    sentence = check_tokens(run, paths, told)
    # The digest covers all files, so it isn't known before the weights are here.
    return Result(
        outcome="succeeded", message=sentence, model=ModelStatus(revision=model.revision, license=model.license)
    )


def check_destination(run: RunConfig, access: Access, *, write: bool) -> tuple[Place, Destination]:
    """The destination is free or this job's own and, with `write`, can be written."""
    place = open_folder(run.output, "output", access)
    there = destination.look(place, run.job)
    if write and there.finished is None:
        destination.probe(place, run.job)
    return place, there


def check_positions(config: bytes, longest: int, field: str) -> None:
    """The model has as many positions as the longest row has tokens. `config` is a config.json that was checked."""
    body = json.loads(config)
    limit = body.get("max_position_embeddings")
    if isinstance(limit, int) and limit < longest and not body.get("is_encoder_decoder"):
        raise Failed(
            "InvalidConfig",
            f"{field} has a row of {longest} tokens, but the model has {limit} positions; lower "
            f"dataset.maxSequenceLength to {limit}",
        )


def check_rows(run: RunConfig, paths: Paths, told: Told) -> None:
    """Every row has the shape it should, and one is left. Raises Failed(DatasetInvalid) with row numbers."""
    for split in fetch.splits(run.data):
        found = rows.read(paths.data(split), run.data.format)
        told(f"{FIELDS[split]}: {len(found.rows)} rows, {len(found.problems)} unusable, {found.duplicates} duplicates")
        if not found.rows or (found.problems and run.data.on_invalid == "fail"):
            listed = rows.listing(found.problems) or "it is empty"
            remedy = "" if run.data.on_invalid == "drop" else "; mend them, or set dataset.onInvalid: drop"
            left = "" if found.rows else ", and no usable one is left"
            raise Failed(
                "DatasetInvalid",
                f"{FIELDS[split]}: {len(found.problems)} rows can't be used{left}: {listed}{remedy}",
            )


def check_tokens(run: RunConfig, paths: Paths, told: Told) -> str:
    """As `check_rows`, and once tokenized there is something to learn in each row. Returns what was counted."""
    from finetune_trainer.examples import prepare
    from finetune_trainer.render import Renderer

    renderer = Renderer.load(paths.model, run.data.max_sequence_length)
    counted = []
    for split in fetch.splits(run.data):
        found = prepare(
            paths.data(split),
            FIELDS[split],
            format=run.data.format,
            on_invalid=run.data.on_invalid,
            renderer=renderer,
        )
        longest = max(len(example.ids) for example in found.examples)
        check_positions((paths.model / "config.json").read_bytes(), longest, FIELDS[split])
        counted.append(
            f"{split}: {len(found.examples)} rows, {found.tokens} tokens of which {found.label_tokens} are learnt, "
            f"{found.dropped} rows dropped, {found.truncated} cut, {found.duplicates} duplicates"
        )
        told(counted[-1])
    return "; ".join(counted)
