"""A rollout's candidates from their lengths."""

import numpy as np

from darts.pool import CandidatePool


def pool_of(lengths: list[list[int]], fates: list[str] | None = None, **columns) -> CandidatePool:
    """Candidates of the given lengths, all finished and the first kept; or with the fates of a trace."""
    fates = fates or ["k" + "d" * (len(row) - 1) for row in lengths]
    letters = np.array(list("".join(fates)))
    defaults = {
        "length": np.concatenate(lengths),
        "state": list("".join(fates).translate(str.maketrans("kf", "dt"))),
        "kept": np.isin(letters, ["k", "f"]),
        "ended_at": 1.0,
    }
    return CandidatePool.of([len(row) for row in lengths], **(defaults | columns))
