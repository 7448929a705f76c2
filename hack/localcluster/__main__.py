"""Entry of `python3 -m localcluster`; does nothing but call the command line."""

import sys

from localcluster.cli import main

sys.exit(main(sys.argv[1:]))
