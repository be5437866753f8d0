"""`python -m darts.engines profile`, see `darts.engines.command`."""

from darts.engines.command import main

raise SystemExit(main())
