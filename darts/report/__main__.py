"""`python -m darts.report RUN`; see `darts.report.page`."""

import sys

from darts.report.page import main

if __name__ == "__main__":
    sys.exit(main())
