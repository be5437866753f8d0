"""Can this configuration run? Asked before Ray starts, answered in one line."""

ACTOR, ROLLOUT, MODEL, REFERENCE = (f"actor_rollout_ref.{name}" for name in ("actor", "rollout", "model", "ref"))
