"""Can this configuration run? Asked before Ray starts, answered in one line."""
