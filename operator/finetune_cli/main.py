"""The entry point of `finetune` and `kubectl finetune`.

Each subcommand is a module with the functions `add_arguments` and `run`. It imports optional
packages where it uses them; `main` explains the error of one that isn't installed.
"""

from __future__ import annotations

import argparse
import sys

from finetune_api import __version__
from finetune_cli import report, run, serve_manifest, show_plan, validate

_COMMANDS = (
    ("run", run, "train on this machine, without a cluster", "Trains a FineTuneJob on this machine, with the same "
     "file and the same trainer as in a cluster, and writes the result to a folder. Ctrl-C saves a checkpoint; run the "
     "same command again to resume.\n\n"
     "Exit codes: 0 if the job succeeded, 143 if it was stopped (run the same command again to resume), 2 if a file or "
     "an option is invalid, else the trainer's exit code, listed by `python -m finetune_trainer --help`."),
    ("validate", validate, "check files, without a cluster", "Reports what the API server would refuse, with file, "
     "line, field and value. With --data it also checks the rows and prints the data report that a run makes before "
     "training. The exit code is 1 if anything is wrong, and 2 if a Python package that --data needs is missing."),
    ("plan", show_plan, "show what would be created, without a cluster", "Shows world size, batches, strategy and the "
     "Kubernetes objects of the first attempt."),
    ("report", report, "write a result's report.html again", "Reads the finetune folder of a finished result and "
     "writes a page with its scores, curves, samples to review, data, decisions, cost and provenance."),
    ("serve-manifest", serve_manifest, "print what serves a result on a server of your choice", "Prints the manifest "
     "or the API call that serves a finished result, and notes about it on stderr. If the server can't load the "
     "result, the exit code is 1 and the message gives the reason and a remedy."),
)  # fmt: skip
MISSING_PACKAGE = 2
_TRAINER = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "safetensors",
    "huggingface_hub",
    "obstore",
    "cryptography",
    "prometheus_client",
    "pynvml",
    "sentencepiece",
    "tokenizers",
    "numpy",
    "mlflow",
    "pyarrow",
    "rouge_score",
    "sacrebleu",
)
EXTRAS = {
    **dict.fromkeys(_TRAINER, "trainer"),
    **dict.fromkeys(("kopf", "kubernetes", "aiohttp", "uvloop"), "operator"),
    **dict.fromkeys(("rich", "jinja2", "markupsafe"), "cli"),
    "wandb": "wandb",
}
"""The extra that installs a package, by the name under which the package is imported."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand. Returns the exit code, which is 2 if a Python package is missing."""
    parser = argparse.ArgumentParser(prog="finetune", description="Fine-tunes language models from FineTuneJob files.")
    parser.add_argument("--version", action="version", version=__version__)
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module, help_line, description in _COMMANDS:
        sub = subcommands.add_parser(
            name, help=help_line, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except ModuleNotFoundError as error:
        message = explanation(error)
        if message is None:
            raise
        print(f"finetune {options.command}: {message}", file=sys.stderr)
        return MISSING_PACKAGE
    return code


def explanation(error: ModuleNotFoundError) -> str | None:
    """Returns what is missing and how it is installed; None for a package that no extra has.

    The error may name several packages, separated by commas.
    """
    packages = [module.strip().partition(".")[0] for module in (error.name or "").split(",")]
    if not EXTRAS.keys() >= set(packages):
        return None
    extras = ",".join(sorted({EXTRAS[package] for package in packages}))
    verb = "isn't" if len(packages) == 1 else "aren't"
    return (
        f"{', '.join(packages)} {verb} installed; install finetune-operator[{extras}], "
        f"by `make venv` or by `pip install '.[{extras}]'` in the repository"
    )


if __name__ == "__main__":
    sys.exit(main())
