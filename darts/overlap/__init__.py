"""Log-probs while generation runs, the driver's side: what workers report, the session with the ranks, the join."""
