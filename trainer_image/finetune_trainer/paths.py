"""Where everything lies on a node's scratch disk: the meeting place of the supervisor and its ranks. Pure.

The supervisor fills `model`, `data` and, on a restart, `resume` before it starts the ranks. The ranks append to
`events`, complete folders under `checkpoints` and, at the end, fill `export`. `stop` is a flag: when it exists on
any node, all ranks agree to save a checkpoint after the current step and to end as preempted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    scratch: Path

    @property
    def run_config(self) -> Path:
        """The RunConfig, copied here so that a rank reads what its supervisor read."""
        return self.scratch / "run.json"

    @property
    def model(self) -> Path:
        """config.json, tokenizer, *.safetensors of the base."""
        return self.scratch / "model"

    def data(self, split: str) -> Path:
        """The one file of a split (train, validation, test) as it was fetched, whatever it holds."""
        return self.scratch / "data" / f"{split}.jsonl"

    def data_folder(self, split: str, place: int) -> Path:
        """The files of a split's n-th place, under their own names, where a split may have several."""
        return self.scratch / "data" / split / str(place)

    @property
    def data_report(self) -> Path:
        """What the rows turned out to be; written by rank 0 before training."""
        return self.scratch / "data-report.json"

    @property
    def token_cache(self) -> Path:
        return self.scratch / "tokens"

    @property
    def resume(self) -> Path:
        """A verified checkpoint to go on from; absent on a fresh start."""
        return self.scratch / "resume"

    @property
    def halvings(self) -> Path:
        """How often earlier attempts' lack of memory halves micro-batches, as a number; absent where none did."""
        return self.scratch / "halvings"

    @property
    def checkpoints(self) -> Path:
        """step-N folders, each complete once it has that name (written as step-N.tmp, then renamed)."""
        return self.scratch / "checkpoints"

    @property
    def best(self) -> Path:
        """The weights with the lowest eval loss so far."""
        return self.scratch / "best"

    @property
    def export(self) -> Path:
        """The result as it will lie in the destination, without finetune/manifest.json."""
        return self.scratch / "export"

    @property
    def events(self) -> Path:
        return self.scratch / "events"

    def rank_events(self, rank: int) -> Path:
        return self.events / f"rank-{rank}.jsonl"

    def rank_alive(self, rank: int) -> Path:
        """Touched by a rank while it gets on; holds its phase."""
        return self.events / f"rank-{rank}.alive"

    def rank_log(self, rank: int) -> Path:
        """stdout and stderr of a rank."""
        return self.scratch / "logs" / f"rank-{rank}.log"

    @property
    def tracking(self) -> Path:
        """Of the process that speaks to trackers: its log, and what trackers keep."""
        return self.scratch / "tracking"

    @property
    def tracking_ending(self) -> Path:
        """How the attempt ended, for that process; absent before."""
        return self.scratch / "tracking-ending.json"

    @property
    def compiled(self) -> Path:
        """Programs that PyTorch's inductor made."""
        return self.scratch / "compiled"

    @property
    def answers(self) -> Path:
        """Generated answers as they come, kept from attempt to attempt."""
        return self.scratch / "answers"

    @property
    def stop(self) -> Path:
        return self.scratch / "stop"
