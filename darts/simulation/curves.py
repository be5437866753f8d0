"""Latency curves by name, or from the file of a measured profile.

Contract: the built-in curves are estimates of GPUs that nobody measured here (our choice), for a first look: time to
read the weights and each sequence's cache of 1,500 tokens at 80 % of the memory's bandwidth, or to compute at 50 % of
the peak where that is longer, plus launches and communication. Measure your own: `python -m darts.engines profile`.
"""

import json
from pathlib import Path

from darts.config import ConfigError
from darts.evidence.profile import LatencyProfile
from darts.latency import LatencyCurve
from darts.simulation import SimulationError

SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
BUILTIN = {
    # A 14B model over 4 GPUs with 148 TFLOPS and 4 TB/s each.
    "h20-like": (0.0078, 0.0080, 0.0083, 0.0088, 0.0122, 0.019, 0.033, 0.062, 0.119),
    # A 7B model on one GPU with 990 TFLOPS and 3.35 TB/s.
    "h100-like": (0.0077, 0.0079, 0.0082, 0.0087, 0.0097, 0.0119, 0.0180, 0.034, 0.066),
    # Memory-bound throughout: a step hardly grows with the batch.
    "flat": (0.0200, 0.0202, 0.0204, 0.0208, 0.0216, 0.0232, 0.0264, 0.0328, 0.0456),
}
"""Seconds of a step at `SIZES`."""


def load_curve(name: str) -> tuple[LatencyCurve, str]:
    """A built-in curve by its name, or that of a file: a profile, or `LatencyCurve.to_dict()` as JSON.

    Returns:
        The curve, and one line that says what it is.

    Raises:
        SimulationError: neither a known name nor a file that holds a curve.
    """
    if name in BUILTIN:
        return LatencyCurve(SIZES, BUILTIN[name]), f"{name} (built in: an estimate, not measured)"
    curve_path = Path(name)
    if not curve_path.is_file():
        raise SimulationError(
            f"--curve {name}: neither a file nor one of {', '.join(BUILTIN)}; measure one with "
            "`python -m darts.engines profile --out FILE`."
        )
    try:
        curve_state = json.loads(curve_path.read_text())
        if isinstance(curve_state, dict) and set(curve_state) == {"batch_sizes", "seconds"}:
            return LatencyCurve.from_dict(curve_state), f"{curve_path}"
        profile = LatencyProfile.load(curve_path)
        return profile.curve(), f"{curve_path} ({profile.device}, tensor parallel {profile.tensor_parallel})"
    except (ConfigError, OSError, UnicodeDecodeError, ValueError) as error:
        error_text = " ".join(str(error).split())
        raise SimulationError(f"--curve {curve_path}: holds no latency curve: {error_text}") from None
