"""`python -m harness COMMAND` is the same program as the `harness` script."""

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main())
