"""Names all paths on a node's scratch disk, where the supervisor and its ranks exchange data. Pure.

The supervisor fills `model`, `data` and, on a restart, `resume` before it starts the ranks. The
ranks append to `events`, write complete folders below `checkpoints` and, at the end, fill `export`.
`stop` is a flag: if it exists on any node, all ranks agree to save a checkpoint after the current
step and to end as preempted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finetune_api.names import CHECKPOINTS_DIR

_STEP = re.compile(r"step-(\d+)")


def step_number(name: str) -> int | None:
    """Returns N for a checkpoint's folder name `step-N`.

    Returns None for every other name, such as that of a half-written folder, `step-N.tmp`.
    """
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def split_checkpoint_path(path: str) -> tuple[int, str] | None:
    """Returns (N, the path inside the checkpoint) for a file `checkpoints/step-N/…` of the
    destination, and None for every other path."""
    root, _, below = path.partition("/")
    folder, separator, rest = below.partition("/")
    step = step_number(folder)
    return (step, rest) if root == CHECKPOINTS_DIR and separator and step is not None else None


@dataclass(frozen=True)
class Paths:
    """Holds the root of the scratch disk; its properties are the paths below it."""

    scratch: Path

    @property
    def run_config(self) -> Path:
        """The RunConfig is copied here, so a rank reads the same one as its supervisor."""
        return self.scratch / "run.json"

    @property
    def model(self) -> Path:
        """The folder has config.json, the tokenizer and the *.safetensors of the base model."""
        return self.scratch / "model"

    def data(self, split: str) -> Path:
        """Returns the only file of a split (train, validation or test), as it was downloaded.

        The suffix is .jsonl whatever the format is.
        """
        return self.scratch / "data" / f"{split}.jsonl"

    def data_folder(self, split: str, index: int) -> Path:
        """Returns the folder for the files of a split's source number `index`.

        It is used if a split may have several files, which keep their names.
        """
        return self.scratch / "data" / split / str(index)

    @property
    def data_report(self) -> Path:
        """The report on the rows is written by rank 0 before training."""
        return self.scratch / "data-report.json"

    @property
    def token_cache(self) -> Path:
        """The folder has the tokenized rows, one subfolder per cache key."""
        return self.scratch / "tokens"

    @property
    def resume(self) -> Path:
        """The folder has the verified checkpoint to resume from; it is absent on a fresh start."""
        return self.scratch / "resume"

    @property
    def start(self) -> Path:
        """The folder has the checkpoint or the adapter of another job whose weights this job starts
        from; it is absent if it starts from the base or resumes."""
        return self.scratch / "start"

    @property
    def halvings(self) -> Path:
        """The file has one number: how often micro-batches are halved because earlier attempts ran
        out of memory. It is absent outside a supervisor."""
        return self.scratch / "halvings"

    @property
    def checkpoints(self) -> Path:
        """The folder has complete `step-N` folders: written as `step-N.tmp`, then renamed."""
        return self.scratch / "checkpoints"

    @property
    def best(self) -> Path:
        """The folder has the weights with the lowest eval loss so far."""
        return self.scratch / "best"

    @property
    def export(self) -> Path:
        """The folder has the result as it will be uploaded, without finetune/manifest.json."""
        return self.scratch / "export"

    @property
    def events(self) -> Path:
        """The folder has the files through which ranks report to the supervisor."""
        return self.scratch / "events"

    def rank_events(self, rank: int) -> Path:
        """Returns the file to which a rank appends its events, one JSON object per line."""
        return self.events / f"rank-{rank}.jsonl"

    def rank_heartbeat(self, rank: int) -> Path:
        """Returns the file that a rank touches while it makes progress; it has the rank's phase."""
        return self.events / f"rank-{rank}.alive"

    def rank_log(self, rank: int) -> Path:
        """Returns the file with a rank's stdout and stderr."""
        return self.scratch / "logs" / f"rank-{rank}.log"

    @property
    def flight_request(self) -> Path:
        """If the file exists, each rank writes its flight recorder to `flight_record`."""
        return self.events / "flight-request"

    def flight_record(self, rank: int) -> Path:
        """Returns the file with the last collectives of a rank that hung."""
        return self.events / f"flight-{rank}.json"

    def nccl_log(self, rank: int) -> Path:
        """Returns the file to which NCCL logs how a rank communicates."""
        return self.scratch / "logs" / f"nccl-{rank}.log"

    @property
    def tracking(self) -> Path:
        """The folder belongs to the tracker process: its log and the files that trackers write."""
        return self.scratch / "tracking"

    @property
    def tracking_ending(self) -> Path:
        """The file tells the tracker process how the attempt ended; it is absent until then."""
        return self.scratch / "tracking-ending.json"

    @property
    def compiled(self) -> Path:
        """The folder has the kernels that PyTorch Inductor compiled."""
        return self.scratch / "compiled"

    @property
    def answers(self) -> Path:
        """The folder has generated answers as they come; it survives from attempt to attempt."""
        return self.scratch / "answers"

    @property
    def stop(self) -> Path:
        """The file is the stop flag that is described above."""
        return self.scratch / "stop"
