"""`python -m darts.bench`, or `python -m darts.bench NAME` for the other benches; see `darts.bench.command`."""

import sys

from darts.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
