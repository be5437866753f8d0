"""`python -m darts.simulation`; see `darts.simulation.command`."""

from darts.simulation.command import main

raise SystemExit(main())
