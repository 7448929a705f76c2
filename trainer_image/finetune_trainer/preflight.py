"""The checks before hardware is spent: destination, model, data. `python -m finetune_trainer preflight` runs them
all in a pod without GPU; the supervisor runs the cheap ones before it starts the ranks. Never loads weights.
"""

from __future__ import annotations

import json

from finetune_api.data_report import SplitName
from finetune_api.result import Result
from finetune_api.run import RunConfig
from finetune_api.status import DataStatus, ModelStatus
from finetune_trainer import destination, fetch, inputs, rows
from finetune_trainer.destination import Destination
from finetune_trainer.failure import Failed
from finetune_trainer.fetch import Told
from finetune_trainer.paths import Paths
from finetune_trainer.place import Place
from finetune_trainer.store import Access, open_folder

_KEPT = 10_000  # unusable rows; all are counted


def check(run: RunConfig, paths: Paths, access: Access, told: Told) -> Result:
    """Everything but the weights. Raises Failed with the field, the value and the remedy."""
    told(f"checking the destination {run.output.display}")
    _, there = check_destination(run, access, write=True)
    if there.finished is not None:
        return Result(outcome="succeeded", message="the result is there already")
    model = fetch.model(run, paths, access, told, weights=False)
    fetch.data(run, paths, access, told)
    sentence, data = check_tokens(run, paths, told)
    # The digest covers all files, so it isn't known before the weights are here.
    found = ModelStatus(revision=model.revision, license=model.license)
    return Result(outcome="succeeded", message=sentence, model=found, data=data)


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
    import numpy as np

    from finetune_trainer import alike

    for split in inputs.splits(run.data):
        where = inputs.field(run.data, split)
        count, unusable, unlabelled, formats = 0, 0, 0, []
        problems: list[rows.Problem] = []
        seen = bytearray()
        files = inputs.of(run.data, paths, split)
        for index, file in enumerate(files):
            stream, _ = rows.stream(file, where, file=index, named=len(files) > 1)
            for row in stream:
                if not isinstance(row, rows.Problem):
                    count += 1
                    seen += rows.digest(row)
                elif row.unlabelled:
                    unlabelled += 1
                else:
                    unusable += 1
                    problems += [row] if unusable <= _KEPT else []
            formats.append(stream.format or "no readable row")
        first = alike.first(np.frombuffer(bytes(seen), np.uint8).reshape(-1, 16))
        said = f"{count} rows of {', '.join(dict.fromkeys(formats))}, {unusable} unusable"
        said += f", {unlabelled} without a sure label" if unlabelled else ""
        told(f"{where}: {said}, {(first != np.arange(count)).sum()} duplicates")
        if not count or (unusable and run.data.on_invalid == "fail"):
            listed = rows.listing(problems) or (f"{unlabelled} have no sure label" if unlabelled else "it is empty")
            remedy = "" if run.data.on_invalid == "drop" else "; mend them, or set dataset.onInvalid: drop"
            left = "" if count else ", and no usable one is left"
            raise Failed("DatasetInvalid", f"{where}: {unusable} rows can't be used{left}: {listed}{remedy}")


def check_tokens(run: RunConfig, paths: Paths, told: Told) -> tuple[str, DataStatus]:
    """As `check_rows`, and once tokenized there is something to learn in each row. Tells the data report, and returns
    what was counted."""
    from finetune_trainer import certify, data, survey, survey_text, tokens
    from finetune_trainer.render import Renderer

    renderer = Renderer.load(paths.model, run.data.max_sequence_length, run.data.chat_template, run.added_tokens)
    checks = certify.certify(renderer, own=run.data.chat_template is None)
    loaded: dict[SplitName, tokens.Tokens] = {}
    for split in inputs.splits(run.data):
        where, files = inputs.field(run.data, split), inputs.of(run.data, paths, split)
        loaded[split] = tokens.build(
            paths.token_cache,
            data.key(run, paths, files),
            files,
            where,
            on_invalid=run.data.on_invalid,
            renderer=renderer,
        )
        longest = int(loaded[split].lengths.max())
        check_positions((paths.model / "config.json").read_bytes(), longest, where)
    found = survey.report(
        data.parts_of(run, loaded), longest=run.data.max_sequence_length, renderer=renderer, checks=checks
    )
    for line in survey_text.lines(found):
        told(line)
    paths.data_report.write_text(found.model_dump_json(by_alias=True, exclude_none=True))
    counted = "; ".join(
        f"{split.split}: {split.rows} rows, {split.tokens} tokens of which {split.label_tokens} are learnt, "
        f"{split.dropped} rows dropped, {split.truncated.rows} cut, {split.duplicates.rows} duplicates"
        for split in found.splits
    )
    return counted, survey.summary(found)
