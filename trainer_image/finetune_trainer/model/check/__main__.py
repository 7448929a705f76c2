"""`python -m finetune_trainer.model.check SCRATCH` builds the model of SCRATCH/run.json.

Its last line of output is a JSON object: what was decided, and the capacity of the model or the
reason why it is refused. The program reads headers and settings only, and needs no GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from finetune_api.messages.run import parse
from finetune_trainer import libraries
from finetune_trainer.errors import RunError, run_error_from
from finetune_trainer.paths import Paths


def main(scratch: str) -> dict[str, Any]:
    """Returns the answer for the run in a scratch folder."""
    paths = Paths(Path(scratch))
    libraries.quiet()
    decisions: list[str] = []
    try:
        from finetune_trainer.model.check import trial

        capacity = trial.build(parse(paths.run_config.read_bytes()), paths.model, decisions)
    except RunError as error:
        return {"decisions": decisions, "reason": error.reason, "message": error.message}
    except BaseException as error:
        refused = run_error_from(error)
        return {"decisions": decisions, "reason": refused.reason, "message": refused.message}
    return {"decisions": decisions, "capacity": vars(capacity)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
