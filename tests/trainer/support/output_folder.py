"""A real folder as the destination of a job, with what this job and others have left in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune_api.messages.run import JobRef, RunConfig
from finetune_trainer.destination import claim
from finetune_trainer.manifest import Contents, build_manifest, write_checkpoint_manifest
from finetune_trainer.storage.local import LocalStorage
from trainer.support.supervisor_process import JobSetup

RECIPE = {"model": "m1", "dataset": "d1", "method": "h1", "training": "t1"}
OWN = JobRef(namespace="ns", name="job", uid="uid-2", attempt=1)
FORMER = JobRef(namespace="ns", name="job", uid="uid-1", attempt=3)
STRANGER = JobRef(namespace="ns", name="other", uid="uid-3", attempt=1)
NEIGHBOR = JobRef(namespace="elsewhere", name="job", uid="uid-4", attempt=1)


@dataclass(frozen=True)
class Place:
    """An output folder, and the job that is about to use it."""

    storage: LocalStorage
    folder: Path
    run: RunConfig

    def with_checkpoint(self, step: int, job: JobRef) -> None:
        folder = self.folder / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_text(f"weights {step}")
        write_checkpoint_manifest(folder, job, step)

    def with_result(self, job: JobRef) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "adapter_model.safetensors").write_text("adapter")
        manifest = build_manifest(self.folder, Contents("adapter", job, 4))
        (self.folder / "finetune").mkdir(exist_ok=True)
        (self.folder / "finetune/manifest.json").write_text(manifest.model_dump_json(by_alias=True))

    def with_claim(self, job: JobRef, recipe: dict[str, str]) -> None:
        claim.create(self.storage, job, recipe)

    def write(self, path: str, content: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    @property
    def owner(self) -> str | None:
        owner = claim.read(self.storage)
        return owner.uid if owner else None

    @property
    def files(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    @property
    def contents(self) -> dict[str, bytes]:
        return {path: (self.folder / path).read_bytes() for path in self.files}


def place(tmp_path: Path, **changes: object) -> Place:
    run = JobSetup(tmp_path).run().model_copy(update={"job": OWN, "recipe": RECIPE, **changes})
    return Place(LocalStorage(tmp_path / "out", role="output", display="s3://models/v1"), tmp_path / "out", run)
