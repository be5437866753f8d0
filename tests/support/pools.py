"""A rollout's candidates from their lengths."""

import numpy as np

from darts.pool import CandidatePool


def pool_of(lengths: list[list[int]], fates: list[str] | None = None, **columns) -> CandidatePool:
    """Candidates of the given lengths, all finished and the first kept; or with the fates of a trace."""
    fates = fates or ["k" + "d" * (len(row) - 1) for row in lengths]
    letters, flat = np.array(list("".join(fates))), np.concatenate(lengths).astype(np.int64)
    count = len(flat)
    defaults = {
        "prompt": np.repeat(np.arange(len(lengths)), [len(row) for row in lengths]),
        "candidate": np.concatenate([np.arange(len(row)) for row in lengths]),
        "length": flat,
        "truncated": np.isin(letters, ["t", "f"]),
        "aborted": letters == "a",
        "lost": letters == "x",
        "kept": np.isin(letters, ["k", "f"]),
        "arrival": np.zeros(count, dtype=np.int64),
        "num_long": np.zeros(count, dtype=np.int64),
        "saturated": np.zeros(count, dtype=bool),
        "reward": np.full(count, np.nan),
        "weights_min": np.ones(count, dtype=np.int64),
        "weights_max": np.ones(count, dtype=np.int64),
        "prompt_tokens": np.ones(count, dtype=np.int64),
        "cached_tokens": np.zeros(count, dtype=np.int64),
        "chunks": np.zeros(count, dtype=np.int64),
        "chunk_seconds": np.zeros(count),
        "ended_at": np.ones(count),
        "stop_seconds": np.full(count, np.nan),
        "tokens_after": np.zeros(count, dtype=np.int64),
    }
    return CandidatePool(**(defaults | columns))
