"""What whole rows bring to a rank besides tokens, where the model has a processor.

Contract.
1. Extras arrive as references; `fetch_extras` gives their values or says why they cannot be used, and never raises for
   what the rows bring: a call is refused by all ranks together.
2. Positions of a call have equally many layers on all ranks (4 with M-RoPE, else 1; 0: no row has extras). Rows and
   company that bring nothing get those of text.
3. Rows with images are left out where the models cannot run them while another rank has none, which is said once: verl
   computes them after generation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ray

from darts.messages import Extras, Row

FETCH_S = 60.0
"""Seconds that the values of a call's extras may take to arrive."""


def fetch_extras(rows: Sequence[Row]) -> tuple[str | None, list[Extras | None]]:
    """Extras of the rows, as values, or why there are none."""
    try:
        fetched = iter(fetch([row.extras for row in rows if row.extras is not None]))
    except ray.exceptions.RayError as error:
        return f"the extras of a row are gone: {error!r}", []
    extras = [None if row.extras is None else next(fetched) for row in rows]
    layers = {len(extra.position_ids) for extra in extras if extra is not None}
    for row, extra in zip(rows, extras, strict=True):
        if extra is not None and (len(layers) > 1 or extra.position_ids.shape[1:] != row.token_ids.shape):
            shape = extra.position_ids.shape
            return f"{row.key}: positions {shape} of {len(row.token_ids)} tokens, layers {layers}", []
    return None, extras


def fetch(extras: Sequence[Extras]) -> list[Extras]:
    """The same extras with values for references.

    Raises:
        ray.exceptions.RayError: a value is gone, as with the worker that owned it, or does not come within `FETCH_S`.
    """
    fields = [field for extra in extras for field in (extra.position_ids, extra.multi_modal_inputs)]
    references = list({field for field in fields if isinstance(field, ray.ObjectRef)})
    values = dict(zip(references, ray.get(references, timeout=FETCH_S), strict=True)) if references else {}
    found = [values[field] if isinstance(field, ray.ObjectRef) else field for field in fields]
    return [
        Extras(position_ids=positions, multi_modal_inputs=inputs)
        for positions, inputs in zip(found[::2], found[1::2], strict=True)
    ]


def layers_of(extras: Sequence[Extras | None]) -> int:
    """The layers of positions that a rank's rows have; 0: no row has extras."""
    return max((len(extra.position_ids) for extra in extras if extra is not None), default=0)


def text_extras(num_tokens: int, layers: int = 1) -> Extras:
    """Those of a sequence without images."""
    return Extras(position_ids=np.tile(np.arange(num_tokens), (layers, 1)), multi_modal_inputs={})


def completed(sequences: Sequence[np.ndarray], extras: Sequence[Extras | None], layers: int) -> list[Extras]:
    """Extras of all sequences, of which the first have these; none at all without layers."""
    if not layers:
        return []
    padded = [*extras, *[None] * (len(sequences) - len(extras))]
    return [extra or text_extras(len(tokens), layers) for tokens, extra in zip(sequences, padded, strict=True)]
