"""Gets everything onto this node's disk that the ranks need: model, rows and checkpoint.

The destination is claimed before anything is downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

from finetune_trainer.destination import verification
from finetune_trainer.destination.deposit import Deposit
from finetune_trainer.destination.output_check import Destination, Role
from finetune_trainer.log import Log
from finetune_trainer.model_folder import ANY_MODEL
from finetune_trainer.reporting.progress import Poster
from finetune_trainer.storage.base import Storage
from finetune_trainer.supervisor import download, preflight
from finetune_trainer.supervisor.download import Inputs
from finetune_trainer.supervisor.inspection.parent import Inspection
from finetune_trainer.supervisor.node import Node
from finetune_trainer.supervisor.processes import RANK_COMMAND


@dataclass(frozen=True)
class Preparation:
    """Prepares one attempt. `enter` enters a phase, and `report` receives what is being done."""

    node: Node
    deposit: Deposit
    poster: Poster
    enter: Callable[[str, str], None]
    report: Callable[[str], None]
    log: Log

    def destination(self) -> tuple[Storage, Destination]:
        """Claims the destination and returns what this job has stored there.

        A result is among it only if it is proven and whole.
        """
        node = self.node
        self.enter("fetching", f"checking {node.run.output.display}")
        _reset_scratch(node)
        role = Role("leads", self.deposit.writer.sign) if node.leads else Role("follows")
        storage, destination = preflight.check_destination(node.run, node.access, role)
        trust = self.deposit.trust(self._signers, result=True)
        finished = verification.whole_result(storage, destination.finished, trust, node.paths.scratch, self.log)
        return storage, replace(destination, finished=finished)

    def inputs(self, storage: Storage, destination: Destination) -> Inputs:
        """Downloads the rows, the model and the newest checkpoint that counts."""
        node, run = self.node, self.node.run
        data = download.data(run, node.paths, node.access, self.report)
        inspects, inspection = (
            node.leads and not run.checked,
            Inspection(run, node.paths, node.environment, self.report),
        )
        if inspects:
            self.enter("checking", "checking the rows")
            inspection.rows()
            self.enter("fetching", "")
        model = download.model(run, node.paths, node.access, self.report)
        if inspects and node.rank_command == RANK_COMMAND:  # what other programs read is their matter
            self.enter("checking", "checking the tokenizer, the chat template and the tokens")
            inspection.tokens(ANY_MODEL)
            self.enter("fetching", "")
        preflight.fetch_tokens(run, node.paths, storage, self.report)
        trust = self.deposit.trust(self._signers, result=False)
        steps, resume = destination.checkpoints, node.paths.resume
        checkpoint = download.checkpoint(storage, steps, run.job, resume, self.report, trust)
        return Inputs(storage, destination, model, data, checkpoint)

    def _signers(self) -> tuple[str, ...]:
        return self.poster.signers(self.node.timing.operator_timeout)


def _reset_scratch(node: Node) -> None:
    """Deletes what an earlier attempt left on this disk, except downloads, and writes run.json."""
    paths = node.paths
    for folder in (paths.events, paths.checkpoints, paths.export, paths.resume):
        shutil.rmtree(folder, ignore_errors=True)
    paths.stop.unlink(missing_ok=True)
    for folder in (paths.events, paths.checkpoints, paths.model):
        folder.mkdir(parents=True, exist_ok=True)
    paths.run_config.write_text(node.run.model_dump_json(by_alias=True, exclude_none=True))
