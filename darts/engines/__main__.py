"""`python -m darts.engines profile`, see `darts.engines.command`."""

import sys

from darts.engines.command import main

if __name__ == "__main__":
    sys.exit(main())
