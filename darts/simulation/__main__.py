"""`python -m darts.simulation`; see `darts.simulation.command`."""

import sys

from darts.simulation.command import main

if __name__ == "__main__":
    sys.exit(main())
