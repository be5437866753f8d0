"""One page of a run, and the quickstart's summary."""
