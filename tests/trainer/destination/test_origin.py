"""Who wrote what is in the destination: manifests that nobody of the job has signed, and files that
were exchanged, don't count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_api.messages.manifest import FileEntry, Manifest, ManifestJob
from finetune_trainer.destination.signing import EVERYTHING, Signer, Trust, is_signed
from finetune_trainer.manifest import of_bytes
from trainer.support import supervisor_process
from trainer.support.operator_replica import replica
from trainer.support.supervisor_process import JobSetup

MANIFEST = Manifest(
    kind="checkpoint",
    job=ManifestJob(namespace="ns", name="job", uid="uid-1", attempt=1),
    step=4,
    created="2026-01-31T12:00:00Z",
    files=(FileEntry(path="weights.safetensors", size=3, sha256="abc"),),
    provenance={"seed": 1, "nothing": None},
    metrics={"evalLoss": 0.1},
)
FIRST, SECOND = Signer(), Signer()
SIGNED = FIRST.sign(MANIFEST)

# what is believed: (the manifest, the keys in the run's configuration, the keys that the operator
# knows by now, whether earlier attempts may have gone unrecorded, the answer)
BELIEF = {
    "no operator vouches for anybody": (MANIFEST, None, (), False, True),
    "signed by an earlier pod": (SIGNED, (FIRST.public,), (), False, True),
    "signed by one of several": (SIGNED, (SECOND.public, FIRST.public), (), False, True),
    "not signed": (MANIFEST, (FIRST.public,), (), False, False),
    "signed by somebody else": (SIGNED, (SECOND.public,), (), False, False),
    "signed by a pod that the operator has learned of since": (SIGNED, (), (FIRST.public,), False, True),
    "nothing is known at the first attempt": (MANIFEST, (), (), False, False),
    "nothing is known after a restart": (MANIFEST, (), (), True, True),
    "not signed, and a key is known after a restart": (MANIFEST, (), (SECOND.public,), True, False),
    "a signature that isn't base64": (SIGNED.model_copy(update={"signature": "§"}), (FIRST.public,), (), False, False),
    "a key that isn't one": (SIGNED, ("nonsense", ""), (), False, False),
}


@pytest.mark.parametrize(("manifest", "signers", "later", "unrecorded", "believed"), BELIEF.values(), ids=BELIEF)
def test_a_manifest_is_believed_if_a_pod_of_the_job_has_signed_it(
    manifest: Manifest, signers: tuple[str, ...] | None, later: tuple[str, ...], unrecorded: bool, believed: bool
) -> None:
    assert Trust(signers, lambda: later, unrecorded).believes(manifest) is believed


@pytest.mark.parametrize(
    "change",
    [
        {"step": 5},
        {"files": (FileEntry(path="weights.safetensors", size=3, sha256="abd"),)},
        {"job": MANIFEST.job.model_copy(update={"uid": "uid-2"})},
        {"provenance": {"seed": 2}},
        {"metrics": {"evalLoss": 0.2}},
        {"kind": "adapter"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_signature_covers_everything(change: dict[str, object]) -> None:
    stored = Manifest.model_validate_json(SIGNED.model_dump_json(by_alias=True, exclude_none=True, indent=1))
    assert is_signed(stored, [FIRST.public])
    assert not is_signed(stored.model_copy(update=change), [FIRST.public])


def test_without_an_operator_everything_counts() -> None:
    assert EVERYTHING.believes(MANIFEST)


@pytest.fixture
def setup(tmp_path: Path) -> JobSetup:
    (tmp_path / "token").write_text("t0ken")
    return JobSetup(tmp_path).write_inputs()


def forged(output: Path, path: str, manifest: Manifest, content: bytes, file: str) -> None:
    """Writes a manifest that lists one file, as somebody with access to the bucket can."""
    folder = (output / path).parent
    folder.mkdir(parents=True, exist_ok=True)
    root = folder if manifest.kind == "checkpoint" else output
    (root / file).write_bytes(content)
    entry = FileEntry(path=file, size=len(content), sha256=of_bytes(content))
    (output / path).write_text(manifest.model_copy(update={"files": (entry,)}).model_dump_json(by_alias=True))


def test_a_result_that_somebody_else_has_put_there_is_replaced_by_training(setup: JobSetup) -> None:
    fake = MANIFEST.model_copy(update={"kind": "adapter"})
    forged(setup.output, "finetune/manifest.json", fake, b"evil", "adapter_model.safetensors")
    ended = supervisor_process.supervise(setup.with_changes(signers=()).run(), setup.folder)
    assert ended.code == 0, ended.output
    assert "a result that no pod of this job has signed" in ended.output
    assert (setup.output / "adapter_model.safetensors").read_bytes() == b"weights after 4"
    assert ended.last.signer is not None
    assert is_signed(supervisor_process.manifest(setup.output), [ended.last.signer])


def test_a_result_counts_after_its_pod_is_gone_unless_a_file_was_exchanged(setup: JobSetup) -> None:
    first = supervisor_process.supervise(setup.with_changes(signers=()).run(), setup.folder)
    assert first.last.signer is not None
    trusting = setup.with_changes(signers=(first.last.signer,))
    again = supervisor_process.supervise(trusting.run(attempt=2), setup.folder, ranks="/bin/false")
    assert (again.code, again.last.artifact) == (0, first.last.artifact), again.output
    (setup.output / "adapter_model.safetensors").write_bytes(b"evil words now.")
    again = supervisor_process.supervise(trusting.run(attempt=3), setup.folder)
    assert again.code == 0, again.output
    assert "adapter_model.safetensors has another sha256" in again.output
    assert (setup.output / "adapter_model.safetensors").read_bytes() == b"weights after 4"


def test_an_exchanged_checkpoint_is_skipped_for_one_that_a_pod_has_signed(setup: JobSetup) -> None:
    behavior = {"steps": 6, "checkpoint_every": 2, "at_step": 5, "then": "exit", "attempt": 1}
    with replica() as operator:
        progress = supervisor_process.progress_config(operator.url, setup.folder / "token", 0.05)
        job = setup.with_changes(signers=(), progress=progress)
        first = supervisor_process.supervise(job.run(), setup.folder, behavior=behavior)
        assert first.last.checkpoint is not None, first.output
        assert first.last.checkpoint.step == 4
        manifest = json.loads((setup.output / "checkpoints/step-4/manifest.json").read_text())
        fake = Manifest.model_validate({**manifest, "step": 5, "files": [], "signature": None})
        forged(setup.output, "checkpoints/step-5/manifest.json", fake, b'{"step": 5}', "state.json")
        exchanged = Manifest.model_validate(manifest)
        forged(setup.output, "checkpoints/step-4/manifest.json", exchanged, b'{"step": 4}', "state.json")
        # The configuration is older than the key, as when a queue starts a Job again.
        operator.signers = [first.last.signer or ""]
        ended = supervisor_process.supervise(job.run(attempt=2), setup.folder, behavior=behavior)
    assert ended.code == 0, ended.output
    for step in (4, 5):
        assert f"checkpoints/step-{step} is skipped: no pod of this job has signed it" in ended.output
    assert any('"step": 2' in line for line in ended.output.splitlines() if "resuming from" in line)
    assert {progress.signer for _, progress in operator.taken} == {first.last.signer, ended.last.signer}
