"""How long a weight update may stand still, for every transport of this package."""

from __future__ import annotations

import os

POLL_S = 1.0
"""Seconds between two looks at whether the other side still lives."""

TIMEOUT_S = float(os.environ.get("VERL_PATCHES_WEIGHT_TIMEOUT_S", "600"))
"""Seconds without any progress after which a weight update fails."""
