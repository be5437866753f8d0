"""`python -m darts.doctor`."""

import sys

from darts.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
