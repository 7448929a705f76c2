"""Checkpoints that another job left in the output are refused by the preflight, for the same reason
as in the training pod."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_api.messages.run import JobRef
from finetune_trainer.destination import output_check
from finetune_trainer.errors import RunError
from finetune_trainer.manifest import write_checkpoint_manifest
from finetune_trainer.storage.local import LocalStorage
from finetune_trainer.supervisor import download
from trainer.support import supervisor_process
from trainer.support.supervisor_process import JobSetup

OWN = JobRef(namespace="ns", name="job", uid="uid-1", attempt=1)
OTHER = JobRef(namespace="ns", name="elder", uid="uid-2", attempt=3)
UNREADABLE = "not a manifest"
INCOMPLETE = "no manifest"
REFUSAL = "has the checkpoint of ns/elder, not this job's; choose another output.uri, or delete its content"

# case → (what the output has by step, whether the job is refused)
CASES: dict[str, tuple[dict[int, JobRef | str], bool]] = {
    "nothing": ({}, False),
    "own checkpoints": ({2: OWN, 4: OWN}, False),
    "another job's": ({4: OTHER}, True),
    "the newest is another job's": ({2: OWN, 4: OTHER}, True),
    "the newest is the job's own": ({2: OTHER, 4: OWN}, False),
    "step 10 is newer than step 9": ({9: OWN, 10: OTHER}, True),
    "the newest can't be read, and the one before is another job's": ({2: OTHER, 4: UNREADABLE}, True),
    "the newest can't be read, and the one before is the job's own": ({2: OWN, 4: UNREADABLE}, False),
    "none can be read": ({2: UNREADABLE, 4: UNREADABLE}, False),
    "the newest was never completed, and the one before is another job's": ({2: OTHER, 4: INCOMPLETE}, True),
}


def write_checkpoint(output: Path, step: int, content: JobRef | str) -> None:
    folder = output / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    if isinstance(content, JobRef):
        write_checkpoint_manifest(folder, content, step)
    elif content == UNREADABLE:
        (folder / "manifest.json").write_text("{")


def refusal(*arguments: object) -> RunError | None:
    """Returns the error with which the training pod refuses to resume, if it does."""
    try:
        download.checkpoint(*arguments, lambda line: None)  # type: ignore[arg-type]
    except RunError as error:
        return error
    return None


@pytest.mark.parametrize(("checkpoints", "refused"), CASES.values(), ids=CASES)
def test_the_owner_of_the_newest_checkpoint_decides_before_anything_is_downloaded(
    checkpoints: dict[int, JobRef | str], refused: bool, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for step, content in checkpoints.items():
        write_checkpoint(output, step, content)
    storage = LocalStorage(output, role="output", display="s3://models/v1")
    steps = tuple(sorted((step for step, content in checkpoints.items() if content != INCOMPLETE), reverse=True))
    in_training = refusal(storage, steps, OWN, tmp_path / "resume")
    if not refused:
        assert output_check.inspect(storage, OWN).checkpoints == steps
        assert in_training is None
        return
    with pytest.raises(RunError) as error:
        output_check.inspect(storage, OWN)
    assert in_training is not None
    assert (error.value.reason, error.value.message) == ("OutputOccupied", f"output.uri: s3://models/v1 {REFUSAL}")
    assert (in_training.reason, in_training.message) == (error.value.reason, error.value.message)


@pytest.mark.parametrize("command", ["preflight", "supervise"])
def test_a_pod_ends_for_another_jobs_checkpoint_before_it_downloads_anything(command: str, tmp_path: Path) -> None:
    setup = JobSetup(tmp_path).write_inputs()
    write_checkpoint(setup.output, 4, OTHER)
    ended = supervisor_process.start(setup.run(), setup.folder, command=command, ranks="/bin/false").wait()
    assert (ended.code, ended.last.reason) == (67, "OutputOccupied"), ended.output
    assert ended.last.message.endswith(REFUSAL)
    assert "downloading" not in ended.output
    assert json.loads((setup.output / "checkpoints/step-4/manifest.json").read_text())["job"]["uid"] == "uid-2"
