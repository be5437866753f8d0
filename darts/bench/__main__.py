"""`python -m darts.bench`; see `darts.bench.command`."""

import sys

from darts.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
