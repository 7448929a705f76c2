"""The entry point of `python3 -m localcluster`; it only calls the command line."""

import sys

from localcluster.cli import main

sys.exit(main(sys.argv[1:]))
