"""Whose the destination is: tables of what a job meets there, on a real folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from finetune_api.messages.rivals import Rivals, digest_of
from finetune_api.messages.run import JobRef, ProgressConfig
from finetune_trainer.destination import claim, output_check, predecessor
from finetune_trainer.destination.output_check import Role
from finetune_trainer.destination.signing import Signer, is_signed
from finetune_trainer.errors import RunError
from finetune_trainer.storage.local import LocalStorage
from trainer.support import supervisor_process
from trainer.support.output_folder import FORMER, NEIGHBOR, OWN, RECIPE, STRANGER, Place, place
from trainer.support.supervisor_process import JobSetup

T = TypeVar("T")

REFUSALS = {
    "another job's claim": ("claim", STRANGER, RECIPE, "is claimed by ns/other since"),
    "the claim of a job of the same name elsewhere": ("claim", NEIGHBOR, RECIPE, "is claimed by elsewhere/job since"),
    "another job's checkpoint": ("checkpoint", STRANGER, RECIPE, "has the checkpoint of ns/other"),
    "another job's result": ("result", STRANGER, RECIPE, "has the result of ns/other"),
    "a predecessor's result": ("result", FORMER, RECIPE, "has the result of ns/job, a deleted FineTuneJob"),
    "a predecessor with other data": (
        "claimed checkpoint", FORMER, {**RECIPE, "dataset": "d2", "training": "t2"},
        "its recipe differs in spec.dataset, spec.training; choose another output.uri, or set output.existing: discard",
    ),
    "a predecessor whose recipe isn't known": ("checkpoint", FORMER, RECIPE, "whose recipe isn't known"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["preflight", "leads"])
@pytest.mark.parametrize(("content", "job", "recipe", "text"), REFUSALS.values(), ids=REFUSALS)
def test_what_belongs_to_another_job_is_refused_and_stays_as_it_is(
    content: str, job: JobRef, recipe: dict[str, str], text: str, kind: str, tmp_path: Path
) -> None:
    here = place(tmp_path)
    if "claim" in content:
        here.with_claim(job, recipe)
    if "checkpoint" in content:
        here.with_checkpoint(4, job)
    if content == "result":
        here.with_result(job)
    before = here.files
    with pytest.raises(RunError, match="OutputOccupied") as error:
        output_check.take(here.storage, here.run, Role(kind))  # type: ignore[arg-type]
    assert text in error.value.message
    assert job.uid not in error.value.message
    assert here.files == before


def test_a_job_with_checkpoints_of_its_own_takes_over_no_others(tmp_path: Path) -> None:
    here = place(tmp_path, inherits=False)
    here.with_checkpoint(2, OWN)
    here.with_checkpoint(9, FORMER)
    here.with_claim(FORMER, RECIPE)  # whoever writes to the bucket can do so while the job is suspended
    with pytest.raises(RunError, match=r"has the checkpoint after step 9 of ns/job.* although this job has stored"):
        output_check.take(here.storage, here.run, Role("leads"))


class Forgetful(LocalStorage):
    """A store that ignores the condition of a conditional write."""

    def create(self, path: str, data: bytes) -> bool:
        self.write(path, data)
        return True


def test_on_a_store_without_conditional_writes_the_last_claim_counts(tmp_path: Path) -> None:
    storage = Forgetful(tmp_path / "out", role="output", display="s3://models/v1")
    assert claim.create(storage, OWN, RECIPE).uid == OWN.uid
    claim.require(storage, OWN)
    assert claim.create(storage, STRANGER, RECIPE).uid == STRANGER.uid  # it had looked before
    with pytest.raises(RunError, match="is claimed by ns/other"):
        claim.require(storage, OWN)


def test_an_empty_destination_is_claimed_and_given_back(tmp_path: Path) -> None:
    here = place(tmp_path)
    assert output_check.take(here.storage, here.run, Role("preflight")).checkpoints == ()
    assert here.owner == OWN.uid
    assert output_check.take(here.storage, here.run, Role("leads")).checkpoints == ()
    predecessor.release_if_empty(here.storage, OWN)
    assert here.owner is None


def test_of_many_jobs_that_claim_at_once_one_succeeds(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    here = place(tmp_path)
    jobs = [JobRef(namespace="ns", name=f"job-{n}", uid=f"uid-{n}", attempt=1) for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        owners = {owner.uid for owner in pool.map(lambda job: claim.create(here.storage, job, RECIPE), jobs)}
    assert owners == {here.owner}


def test_a_predecessors_checkpoints_become_the_jobs_own(tmp_path: Path) -> None:
    here, signer = place(tmp_path), Signer()
    here.with_claim(FORMER, RECIPE)
    here.with_checkpoint(2, FORMER)
    here.with_checkpoint(4, FORMER)
    partial = here.folder / "checkpoints/step-6/node-1-attempt-1.json"
    partial.parent.mkdir()
    partial.write_text("{}")
    assert output_check.take(here.storage, here.run, Role("preflight")).checkpoints == ()
    assert here.owner == FORMER.uid  # only a pod that trains takes over
    destination = output_check.take(here.storage, here.run, Role("leads", signer.sign))
    assert destination.checkpoints == (4, 2)
    assert here.owner == OWN.uid
    assert not partial.exists()
    for manifest in predecessor.manifests(here.storage).values():
        assert manifest is not None
        assert manifest.job.uid == OWN.uid
        assert is_signed(manifest, [signer.public])
    assert output_check.take(here.storage, here.run, Role("leads")).checkpoints == (4, 2)


def test_a_takeover_that_was_interrupted_is_completed(tmp_path: Path) -> None:
    here = place(tmp_path)
    here.with_claim(FORMER, RECIPE)
    here.with_checkpoint(2, FORMER)
    here.with_checkpoint(4, OWN)  # the newest is written first
    assert output_check.take(here.storage, here.run, Role("leads")).checkpoints == (4, 2)
    assert here.owner == OWN.uid


AUTHORITY = "-----BEGIN CERTIFICATE-----"
LATER = "2999-01-01T00:00:00Z"


def _of_operator(uids: tuple[str, ...] = (), **fields: object) -> dict[str, object]:
    """Return what an operator that knows these other jobs passes to the pods of a job."""
    reporting = ProgressConfig(url="https://operator", token_path="token", authority=fields.pop("authority", AUTHORITY))
    rivals = Rivals(as_of=str(fields.pop("as_of", LATER)), digests=tuple(map(digest_of, uids)), **fields)  # type: ignore[arg-type]
    return {"progress": reporting, "rivals": rivals}


def _claimed_by_a_stranger(here: Place) -> None:
    """A job of another name that was deleted while its first checkpoint was uploaded."""
    cluster = claim.cluster(here.run.model_copy(update=_of_operator()))
    claim.create(here.storage, STRANGER, RECIPE, cluster)
    here.write("checkpoints/step-2/weights.safetensors", "half")
    here.write("checkpoints/memory.json", "{}")
    here.write("notes.txt", "the user's own")


@pytest.mark.parametrize("kind", ["preflight", "leads"])
def test_an_empty_output_whose_owner_does_not_exist_any_more_is_claimed(kind: str, tmp_path: Path) -> None:
    here = place(tmp_path, **_of_operator())
    _claimed_by_a_stranger(here)
    assert output_check.take(here.storage, here.run, Role(kind)).checkpoints == ()  # type: ignore[arg-type]
    assert (here.owner, here.files) == (OWN.uid, ["finetune/owner.json", "notes.txt"])


LIVING: dict[str, dict[str, object]] = {
    "it exists": _of_operator((STRANGER.uid,)),
    "its claim is younger than what the operator knew": _of_operator(as_of="2020-01-01T00:00:00Z"),
    "it is of another cluster": _of_operator(authority="-----BEGIN OTHER CERTIFICATE-----"),
    "nothing tells clusters apart": _of_operator(authority=""),
    "its namespace isn't watched": _of_operator(namespaces=("elsewhere",)),
    "nobody knows": {"rivals": None},
}


@pytest.mark.parametrize("knowledge", LIVING.values(), ids=LIVING)
def test_an_empty_output_whose_owner_may_exist_stays_claimed(knowledge: dict[str, object], tmp_path: Path) -> None:
    here = place(tmp_path, **{**_of_operator(), **knowledge})
    _claimed_by_a_stranger(here)
    before = here.contents
    with pytest.raises(RunError, match="is claimed by ns/other since"):
        output_check.take(here.storage, here.run, Role("leads"))
    assert here.contents == before


def test_claims_of_operators_without_an_authority_are_never_replaced(tmp_path: Path) -> None:
    here = place(tmp_path, **_of_operator(authority=""))
    here.with_claim(STRANGER, RECIPE)
    with pytest.raises(RunError, match="is claimed by ns/other since"):
        output_check.take(here.storage, here.run, Role("leads"))


@pytest.mark.parametrize("content", ["checkpoint", "result"])
def test_what_a_job_that_does_not_exist_any_more_has_stored_stays_its_own(content: str, tmp_path: Path) -> None:
    here = place(tmp_path, **_of_operator())
    _claimed_by_a_stranger(here)
    if content == "checkpoint":
        here.with_checkpoint(4, STRANGER)
    else:
        here.with_result(STRANGER)
    with pytest.raises(RunError, match="is claimed by ns/other since"):
        output_check.take(here.storage, here.run, Role("preflight"))
    assert here.owner == STRANGER.uid


class Death(BaseException):
    """Ends a pod, as SIGKILL does."""


class Mortal(LocalStorage):
    """A folder whose writer dies at one of its writes, before or after it."""

    def __init__(self, root: Path, fatal: int, *, after: bool) -> None:
        super().__init__(root, role="output", display="s3://models/v1")
        self.writes = 0
        self._fatal = fatal
        self._after = after

    def _write(self, action: Callable[[], T]) -> T:
        number, self.writes = self.writes, self.writes + 1
        if number == self._fatal and not self._after:
            raise Death
        answer = action()
        if number == self._fatal:
            raise Death
        return answer

    def create(self, path: str, data: bytes) -> bool:
        return self._write(lambda: LocalStorage.create(self, path, data))

    def write(self, path: str, data: bytes) -> None:
        self._write(lambda: LocalStorage.write(self, path, data))

    def delete(self, paths: tuple[str, ...]) -> None:
        for path in paths:  # a store deletes them one by one, and may be interrupted in between
            self._write(lambda path=path: LocalStorage.delete(self, (path,)))  # type: ignore[misc]


def _predecessor(here: Place) -> None:
    """A deleted job of the same name, killed while it uploaded its third checkpoint."""
    here.with_claim(FORMER, RECIPE)
    here.with_checkpoint(2, FORMER)
    here.with_checkpoint(4, FORMER)
    here.write("checkpoints/step-6/weights.safetensors", "half")
    here.write("checkpoints/memory.json", "{}")


def _predecessor_with_result(here: Place) -> None:
    here.with_result(FORMER)
    here.write("checkpoints/step-8/weights.safetensors", "late")


LIVES: dict[str, tuple[Callable[[Place], None], str]] = {
    "nobody was there": (lambda here: None, "resume"),
    "a stranger's that doesn't exist any more": (_claimed_by_a_stranger, "resume"),
    "applied again": (_predecessor, "resume"),
    "applied again, to begin anew": (_predecessor, "discard"),
    "applied again after its end, to begin anew": (_predecessor_with_result, "discard"),
}


def _take(here: Place, storage: LocalStorage) -> None:
    """Do what a preflight pod does, and then what the first pod that trains does."""
    output_check.take(storage, here.run, Role("preflight"))
    output_check.probe(storage, here.run.job)
    output_check.take(storage, here.run, Role("leads"))


def _bytes(here: Place) -> dict[str, bytes]:
    """Return all files, without the times that are in them."""
    return {path: re.sub(rb"\d{4}-\d\d-\d\dT[0-9:.]+Z", b"", content) for path, content in here.contents.items()}


@pytest.mark.parametrize("after", [False, True], ids=["before each write", "after each write"])
@pytest.mark.parametrize(("prepare", "existing"), LIVES.values(), ids=LIVES)
def test_a_pod_that_dies_at_any_write_of_a_takeover_leaves_it_to_the_next_one(
    prepare: Callable[[Place], None], existing: str, after: bool, tmp_path: Path
) -> None:
    def one(folder: str, fatal: int) -> tuple[Place, Mortal]:
        here = place(tmp_path / folder, existing=existing, **_of_operator())
        prepare(here)
        return here, Mortal(here.folder, fatal, after=after)

    steady, storage = one("steady", fatal=-1)
    _take(steady, storage)
    assert storage.writes >= 3
    for fatal in range(storage.writes):
        here, mortal = one(f"died-{fatal}", fatal)
        with pytest.raises(Death):
            _take(here, mortal)
        if "finetune/owner.json" in here.files:  # nobody else gets it meanwhile
            living = Rivals(as_of=LATER, digests=(digest_of(OWN.uid), digest_of(STRANGER.uid)))
            stranger = here.run.model_copy(update={"job": NEIGHBOR, "rivals": living})
            with pytest.raises(RunError, match="OutputOccupied"):
                output_check.take(here.storage, stranger, Role("preflight"))
        _take(here, here.storage)
        assert _bytes(here) == _bytes(steady)


@pytest.mark.parametrize("left", ["checkpoint", "result", "both"])
def test_what_a_predecessor_left_is_deleted_on_request(left: str, tmp_path: Path) -> None:
    here = place(tmp_path, existing="discard")
    if left != "result":
        here.with_claim(FORMER, {})
        here.with_checkpoint(4, FORMER)
    if left != "checkpoint":
        here.with_result(FORMER)
    (here.folder / "notes.txt").write_text("the user's own")
    assert output_check.take(here.storage, here.run, Role("leads")).checkpoints == ()
    assert here.files == ["finetune/owner.json", "notes.txt"]


@pytest.mark.parametrize("existing", ["resume", "discard"])
def test_files_beside_checkpoints_that_are_none_stay(existing: str, tmp_path: Path) -> None:
    """A folder in checkpoints/ may be the output of another job, or have notes of a person."""
    here = place(tmp_path, existing=existing)
    here.with_claim(FORMER, RECIPE)
    here.with_checkpoint(4, FORMER)
    others = ["checkpoints/adapter_model.safetensors", "checkpoints/finetune/manifest.json", "checkpoints/notes.txt"]
    own = ["checkpoints/memory.json", "checkpoints/scarce-memory-0.json", "checkpoints/tokens/abc/complete.json"]
    for path in (*others, *own):
        here.write(path, "{}")
    output_check.take(here.storage, here.run, Role("leads"))
    assert set(others) <= set(here.files)
    assert not set(own) & set(here.files)


def test_files_outside_of_the_destination_are_never_deleted(tmp_path: Path) -> None:
    here, outside = place(tmp_path, existing="discard"), tmp_path / "precious"
    outside.write_text("precious")
    here.with_result(FORMER)
    file = here.folder / "finetune/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"] += [{"path": path, "size": 8, "sha256": ""} for path in (str(outside), "../precious")]
    file.write_text(json.dumps(manifest))
    output_check.take(here.storage, here.run, Role("leads"))
    assert outside.read_text() == "precious"


def test_another_node_waits_until_node_0_has_taken_over(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    here = place(tmp_path)
    here.with_claim(FORMER, RECIPE)
    here.with_checkpoint(4, FORMER)
    with ThreadPoolExecutor(1) as pool:
        follower = pool.submit(output_check.take, here.storage, here.run, Role("follows"))
        assert not follower.done()
        output_check.take(here.storage, here.run, Role("leads"))
        assert follower.result(timeout=60).checkpoints == (4,)


def test_a_job_whose_destination_was_taken_over_stops_and_overwrites_nothing(tmp_path: Path) -> None:
    setup = JobSetup(tmp_path).write_inputs()
    behavior = {"steps": 8, "checkpoint_every": 2, "hold": str(tmp_path / "go"), "hold_at": 3}
    running = supervisor_process.start(setup.run(), tmp_path, behavior=behavior)
    supervisor_process.wait_until(lambda: (setup.output / "checkpoints/step-2/manifest.json").exists(), 60)
    storage = LocalStorage(setup.output, role="output", display="out")
    claim.take_over(storage, JobRef(namespace="ns", name="job", uid="uid-9", attempt=1), RECIPE)
    (tmp_path / "go").touch()
    ended = running.wait(120)
    assert (ended.code, ended.last.reason) == (67, "OutputOccupied"), ended.output
    assert "was taken over by another FineTuneJob ns/job" in ended.last.message
    assert not (setup.output / "finetune/manifest.json").exists()
    assert claim.read(storage) is not None
