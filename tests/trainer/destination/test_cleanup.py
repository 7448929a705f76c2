"""What a deleted job leaves: each deletion policy on a real folder with files of several jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.destination import claim, cleanup
from finetune_trainer.destination.signing import Signer
from finetune_trainer.errors import RunError
from finetune_trainer.manifest import of_bytes
from finetune_trainer.storage.local import LocalStorage
from trainer.support import supervisor_process
from trainer.support.output_folder import FORMER, OWN, RECIPE, STRANGER, Place, place
from trainer.support.supervisor_process import JobSetup


def clean(here: Place) -> str:
    return cleanup.clean(here.storage, here.run, lambda _: None)


def running_job(here: Place) -> None:
    """A job that was deleted while it trained: two checkpoints, a third one in parts, records."""
    here.with_claim(OWN, RECIPE)
    here.with_checkpoint(2, OWN)
    here.with_checkpoint(4, OWN)
    for path, content in {
        "checkpoints/step-6/weights.safetensors": "half",
        "checkpoints/step-6/.optimizer.safetensors.0a1b2c3d.part": "quarter",
        "checkpoints/step-6/node-1-attempt-1.json": "{}",
        "checkpoints/memory.json": json.dumps({"uid": OWN.uid, "halvings": 1}),
        "checkpoints/tokens/abc/complete.json": json.dumps({"job": OWN.uid, "files": {}}),
        "checkpoints/tokens/abc/0.bin": "tokens",
        "finetune/report.html": "<html>",
        "finetune/tensorboard/events": "curves",
    }.items():
        here.write(path, content)


def finished_job(here: Place) -> None:
    """A job that has succeeded, and whose last upload of a checkpoint came too late."""
    here.with_result(OWN)
    here.write("checkpoints/step-8/weights.safetensors", "late")


REPORTS = ["finetune/report.html", "finetune/tensorboard/events"]
RESULT = ["adapter_model.safetensors", "finetune/manifest.json"]
CASES: dict[str, tuple[Callable[[Place], None], str, list[str], str]] = {
    "training, checkpoints": (running_job, "DeleteCheckpoints", REPORTS, "deleted 2 checkpoints in s3://models/v1"),
    "training, everything": (running_job, "Delete", [], "deleted 2 checkpoints in s3://models/v1"),
    "finished, checkpoints": (finished_job, "DeleteCheckpoints", RESULT, "deleted 0 checkpoints in"),
    "finished, everything": (finished_job, "Delete", [], "deleted 0 checkpoints and the result (1 file, 0.0 MB) in"),
    "never started": (lambda here: None, "Delete", [], "nothing was deleted: there is nothing of this job in"),
    "claimed only": (lambda here: here.with_claim(OWN, RECIPE), "Delete", [], "deleted 0 checkpoints in"),
}


@pytest.mark.parametrize(("prepare", "policy", "left", "sentence"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("times", [1, 2])
def test_a_deleted_job_leaves_what_its_policy_says(
    prepare: Callable[[Place], None], policy: str, left: list[str], sentence: str, times: int, tmp_path: Path
) -> None:
    here = place(tmp_path, deletion_policy=policy)
    prepare(here)
    assert clean(here).startswith(sentence)
    if times == 2:
        clean(here)
    assert here.files == left
    assert not list(here.folder.glob("checkpoints"))


def test_files_of_others_in_the_folder_stay_and_are_named(tmp_path: Path) -> None:
    here = place(tmp_path, deletion_policy="Delete")
    running_job(here)
    others = ["checkpoints/notes.txt", "checkpoints/step-4/evaluation.txt", "finetune/plan.md", "README.md"]
    for path in others:
        here.write(path, "the user's own")
    sentence = clean(here)
    assert here.files == sorted(others)
    assert sentence.endswith(
        "; left are files that aren't proven to be this job's: README.md, checkpoints/notes.txt, "
        "checkpoints/step-4/evaluation.txt and 1 more"
    )


def test_a_file_that_has_replaced_one_of_the_result_stays(tmp_path: Path) -> None:
    here = place(tmp_path, deletion_policy="Delete")
    here.with_result(OWN)
    here.write("adapter_model.safetensors", "ADAPTER")  # of the same size
    assert "the result (0 files" in clean(here)
    assert here.files == ["adapter_model.safetensors"]


FOREIGN: dict[str, Callable[[Place], None]] = {
    "another job's claim": lambda here: here.with_claim(STRANGER, RECIPE),
    "a predecessor's claim": lambda here: here.with_claim(FORMER, RECIPE),
    "another job's result": lambda here: here.with_result(STRANGER),
    "a predecessor's checkpoint": lambda here: here.with_checkpoint(4, FORMER),
    "a later owner's checkpoints": lambda here: (here.with_checkpoint(2, STRANGER), here.with_claim(STRANGER, {}))[1],
}


@pytest.mark.parametrize("prepare", FOREIGN.values(), ids=FOREIGN)
def test_what_another_job_has_stored_is_never_touched(prepare: Callable[[Place], None], tmp_path: Path) -> None:
    here = place(tmp_path, deletion_policy="Delete")
    prepare(here)
    before = here.contents
    assert clean(here).startswith("nothing was deleted")
    assert here.contents == before


def test_another_jobs_checkpoint_stays_in_a_destination_that_is_the_jobs(tmp_path: Path) -> None:
    here = place(tmp_path, deletion_policy="Delete")
    running_job(here)
    here.with_checkpoint(9, FORMER)
    assert "deleted 2 checkpoints" in clean(here)
    assert here.files == ["checkpoints/step-9/manifest.json", "checkpoints/step-9/weights.safetensors"]


def test_a_manifest_that_no_pod_of_the_job_has_signed_deletes_nothing(tmp_path: Path) -> None:
    here = place(tmp_path, deletion_policy="Delete", signers=(Signer().public,))
    here.with_result(OWN)
    before = here.contents
    assert clean(here).startswith("nothing was deleted")
    assert here.contents == before


def test_files_outside_of_the_destination_are_never_deleted(tmp_path: Path) -> None:
    here, outside = place(tmp_path, deletion_policy="Delete"), tmp_path / "precious"
    outside.write_text("precious")
    here.with_result(OWN)
    file = here.folder / "finetune/manifest.json"
    manifest = json.loads(file.read_text())
    digest = of_bytes(b"precious")
    manifest["files"] += [{"path": path, "size": 8, "sha256": digest} for path in (str(outside), "../precious")]
    file.write_text(json.dumps(manifest))
    clean(here)
    assert outside.read_text() == "precious"
    assert here.files == []


class FailingOnce(LocalStorage):
    """A store that doesn't answer the n-th request to delete."""

    failing = 0

    def delete(self, paths: tuple[str, ...]) -> None:
        self.failing -= 1
        if self.failing == 0:
            super().delete(paths[: len(paths) // 2])
            raise RunError("StorageUnavailable", "gone")
        super().delete(paths)


@pytest.mark.parametrize("moment", range(1, 7))
@pytest.mark.parametrize("prepare", [running_job, finished_job])
def test_a_cleanup_that_was_interrupted_anywhere_is_completed(
    prepare: Callable[[Place], None], moment: int, tmp_path: Path
) -> None:
    here = place(tmp_path, deletion_policy="Delete")
    prepare(here)
    store = FailingOnce(here.folder, role="output", display="s3://models/v1")
    store.failing = moment
    try:
        cleanup.clean(store, here.run, lambda _: None)
    except RunError:
        assert claim.read(here.storage) is not None, "nobody else may begin here"
        cleanup.clean(here.storage, here.run, lambda _: None)
    assert here.files == []


def test_the_pod_reports_what_it_has_deleted_and_exits_with_0(tmp_path: Path) -> None:
    setup = JobSetup(tmp_path).write_inputs().with_changes(deletion_policy="Delete")
    job = setup.run().job
    here = place(tmp_path)
    here.with_result(job)
    ended = supervisor_process.supervise(setup.run(), tmp_path, command="cleanup")
    assert (ended.code, ended.last.outcome) == (0, "succeeded"), ended.output
    assert "the result (1 file" in ended.last.message
    assert here.files == []
