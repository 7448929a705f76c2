"""The door of the demo. `up` needs the project's environment (.venv); `down` needs Python alone."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="make the cluster, train the quickstart, show the result")
    up.add_argument("--name", default="demo", help="name of the cluster (default: demo)")
    up.add_argument("--file", default="examples/quickstart.yaml", help="the FineTuneJob to apply")
    up.add_argument("--picture", default="", metavar="SVG", help="also write what is said as a picture")
    up.add_argument("--keep", default="", metavar="DIR", help="also keep status, events, report, scores and pictures")
    keep = commands.add_parser("keep", help="the same of a job that is over, while its cluster is up")
    keep.add_argument("folder", metavar="DIR")
    keep.add_argument("--name", default="demo", help="name of the cluster (default: demo)")
    keep.add_argument("--file", default="examples/definitions.yaml", help="the FineTuneJob that ran")
    down = commands.add_parser("down", help="remove all that `up` made")
    down.add_argument("--name", default="demo", help="name of the cluster (default: demo)")
    arguments = parser.parse_args()
    if arguments.command == "down":
        from demo.clusters import remove

        remove(arguments.name)
        return 0
    from demo.story import keep_finished, tell

    if arguments.command == "keep":
        return keep_finished(arguments.name, arguments.file, arguments.folder)
    return tell(arguments.name, arguments.file, arguments.picture, arguments.keep)


if __name__ == "__main__":
    sys.exit(main())
