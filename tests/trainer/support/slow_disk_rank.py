"""A program that replaces the ranks in tests of the supervisor: it writes or loads a model in one
long block, on a disk that is slow.

FINETUNE_STAND_IN (JSON) has `megabytes` (what is written, 4 MiB at a time) and `pause` (seconds
after each 4 MiB). With 0 megabytes it hangs for `pause` seconds. Afterward, it is `fake_rank`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from finetune_trainer.paths import Paths
from finetune_trainer.reporting.event_writer import EventWriter
from trainer.support import fake_rank

_PART = b"w" * (4 << 20)


def main() -> int:
    behavior = json.loads(os.environ.pop("FINETUNE_STAND_IN"))
    paths, rank = Paths(Path(os.environ["FINETUNE_SCRATCH"])), int(os.environ["RANK"])
    reporter = EventWriter(paths.rank_events(rank), rank)
    reporter.phase("saving")
    with reporter.beating(), (paths.scratch / f"model-{rank}").open("wb") as file:
        for _ in range(behavior["megabytes"] // 4):
            file.write(_PART)
            time.sleep(behavior["pause"])
        if not behavior["megabytes"]:
            time.sleep(behavior["pause"])
    return fake_rank.main()


if __name__ == "__main__":
    sys.exit(main())
