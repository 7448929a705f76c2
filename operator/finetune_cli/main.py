"""The door of `finetune` and `kubectl finetune`. Each subcommand is a module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import sys

from finetune_api import __version__
from finetune_cli import report, run, serve_manifest, show_plan, validate

_COMMANDS = (
    ("run", run, "train on this machine, without a cluster", "Trains a FineTuneJob on this machine: the same file, the "
     "same trainer, a folder instead of a bucket. Ctrl-C saves a checkpoint; the same command goes on from it.\n\n"
     "exit codes: 0 done, 143 stopped (go on by the same command), 2 wrong file or option, else the trainer's, as "
     "`python -m finetune_trainer --help` lists them."),
    ("validate", validate, "check files, without a cluster", "Says what the API server would refuse: file:line, field, "
     "value. With --data also what is in the rows: the data report that a run makes before training. Exit code 1 when "
     "anything is wrong."),
    ("plan", show_plan, "show what would be created, without a cluster", "Shows world size, batches, strategy and the "
     "Kubernetes objects of the first attempt."),
    ("report", report, "make a result's report.html again", "Reads a finished result's finetune folder and writes "
     "the page for people: scores, curves, samples to mark, data, decisions, cost, provenance."),
    ("serve-manifest", serve_manifest, "what serves a result, for a server of your choice", "Prints the manifest or "
     "the call that loads a finished result, and says on stderr what has to be known. Exit code 1 where that server "
     "can't load it, with the reason and the way out."),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
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
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
