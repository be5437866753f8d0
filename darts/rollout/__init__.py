"""verl's rollout with groups of candidates: manager, workers, running groups, and the client of the servers."""
