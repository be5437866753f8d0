"""The file of a measured latency curve, and the fingerprint of the model that it belongs to.

Contract: reads and writes; measuring is `darts.engines.measure`. A profile belongs to a model (its architecture, not
its weights) and a tensor-parallel size; for others it is refused. Another device is a warning: the curve is only too
slow or too fast, and what running engines show corrects it.
"""

import json
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from darts.config import ConfigError
from darts.evidence import documents
from darts.latency import LatencyCurve

KEY = "darts.latency.profile"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyProfile:
    """A measured curve, and what it belongs to."""

    model: str  # path or name, as it was given
    model_id: str  # as `model_id` gives it
    tensor_parallel: int
    device: str  # e.g. "NVIDIA H100 80GB HBM3"
    versions: dict[str, str]
    date: str  # ISO 8601, UTC
    command: str  # what to run to measure again
    engines: int  # that were driven at once
    max_num_seqs: int
    prompt_tokens: int  # of every request
    tokens: int  # decoding steps that were timed
    sampling: dict[str, Any]
    batch_sizes: list[int]
    seconds: list[float]  # of a step, as measured: they may fall

    def curve(self) -> LatencyCurve:
        """The cost model."""
        return LatencyCurve(self.batch_sizes, self.seconds)

    def save(self, path: str | Path) -> None:
        """Writes the file in one go: it is the old one or the new one, never a part."""
        documents.write(Path(path), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "LatencyProfile":
        """What `save` wrote; `ConfigError` for no such file, or not a profile with a curve."""
        try:
            saved_state = json.loads(Path(path).read_text())
        except OSError as error:
            _refuse_file(path, f"the file cannot be read ({error.strerror}).")
        except ValueError:
            _refuse_file(path, "the file is not JSON: it was cut off, or it is no profile.")
        saved_names = set(saved_state) if isinstance(saved_state, dict) else set()
        if differing := saved_names ^ {field.name for field in fields(cls)}:
            differing_text = ", ".join(sorted(differing))
            _refuse_file(path, f"the file is no profile of this version; missing or unknown: {differing_text}.")
        try:
            profile = cls(**saved_state)
            profile.curve()
        except ValueError as error:
            _refuse_file(path, f"the file holds no curve: {error}")
        return profile

    def require(self, path: str | Path, model_id: str, tensor_parallel: int, device: str | None = None) -> None:
        """Checks that this profile, read from `path`, is one of the engines that will run: `ConfigError` for another
        model or tensor-parallel size, a warning for another device."""
        if self.model_id != model_id:
            _refuse_file(path, f"measured for the model {self.model} ({self.model_id}), this run's is {model_id}.")
        if self.tensor_parallel != tensor_parallel:
            measured = f"tensor_model_parallel_size={self.tensor_parallel}"
            _refuse_file(path, f"measured with {measured}, this run has {tensor_parallel}.")
        if device is not None and self.device != device:
            warnings.warn(f"{KEY}={path}: measured on {self.device!r}, this run has {device!r}.", stacklevel=2)


def _refuse_file(path: str | Path, rule: str) -> NoReturn:
    fix = (
        f"measure again with `python -m darts.engines profile --config-name ... --out {Path(path).absolute()}` and the "
        f"overrides of this run, or set {KEY}=auto."
    )
    raise ConfigError(KEY, str(path), rule, fix) from None
