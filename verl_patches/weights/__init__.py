"""How weights travel from the trainer to the servers, and what ends a transfer that does not."""
