"""`python -m keyspan`: the command `keyspan`."""

import sys

from keyspan.cli import main

if __name__ == "__main__":
    sys.exit(main())
