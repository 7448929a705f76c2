"""Runs a FineTuneJob on a throw-away cluster on this machine, from scratch to a tuned model.

`up` shows each of its steps and resumes where an earlier run stopped; `down` removes the cluster.
"""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    """Returns 0 on success, 2 if this machine lacks something, else 1."""
    arguments = _parser().parse_args()
    if arguments.command == "down":
        from demo.clusters import remove

        remove(arguments.name)
        return 0
    if arguments.command == "up":
        from demo.prepare import run

        return run(arguments)
    from demo import walkthrough  # needs the project's environment, which `up` creates

    match arguments.command:
        case "cluster":
            walkthrough.make_cluster(arguments.name, arguments.file)
        case "images":
            walkthrough.load_images(arguments.name)
        case "contents":
            walkthrough.install_contents(arguments.name)
        case "keep":
            return walkthrough.save_finished(arguments.name, arguments.file, arguments.folder)
        case _:
            try:
                return walkthrough.run_job(arguments.name, arguments.file, arguments.picture, arguments.keep)
            except KeyboardInterrupt:
                return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "up": "create the cluster, train, show the result",
        "cluster": "a step of `up`: start the cluster",
        "images": "a step of `up`: load the images into the cluster",
        "contents": "a step of `up`: upload model and data, install the operator",
        "job": "a step of `up`: apply the job and follow it",
        "keep": "save the status, events, report and pictures of a finished job, while its cluster is up",
        "down": "remove the cluster",
    }
    for command, text in texts.items():
        subparser = commands.add_parser(command, help=text, description=text)
        subparser.add_argument("--name", default="demo", help="name of the cluster (default: demo)")
        if command in ("up", "cluster", "job", "keep"):
            default = "examples/definitions.yaml" if command == "keep" else "examples/quickstart.yaml"
            subparser.add_argument("--file", default=default, help="file with the FineTuneJob (default: %(default)s)")
        if command in ("up", "job"):
            subparser.add_argument(
                "--picture", default="", metavar="SVG", help="also save the output as an SVG picture"
            )
            subparser.add_argument(
                "--keep", default="", metavar="DIR", help="also save status, events, report and pictures"
            )
        if command == "keep":
            subparser.add_argument("folder", metavar="DIR", help="folder to write to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
