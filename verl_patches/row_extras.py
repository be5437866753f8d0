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
        fetched_extras = iter(fetch([row.extras for row in rows if row.extras is not None]))
    except ray.exceptions.RayError as error:
        return f"the extras of a row are gone: {error!r}", []
    extras = [None if row.extras is None else next(fetched_extras) for row in rows]
    layer_counts = {len(row_extra.position_ids) for row_extra in extras if row_extra is not None}
    for row, row_extra in zip(rows, extras, strict=True):
        if row_extra is not None and (len(layer_counts) > 1 or row_extra.position_ids.shape[1:] != row.token_ids.shape):
            position_shape = row_extra.position_ids.shape
            return f"{row.key}: positions {position_shape} of {len(row.token_ids)} tokens, layers {layer_counts}", []
    return None, extras


def fetch(extras: Sequence[Extras]) -> list[Extras]:
    """The same extras with values for references.

    Raises:
        ray.exceptions.RayError: a value is gone, as with the worker that owned it, or does not come within `FETCH_S`.
    """
    extra_fields = [field for row_extra in extras for field in (row_extra.position_ids, row_extra.multi_modal_inputs)]
    references = list({field for field in extra_fields if isinstance(field, ray.ObjectRef)})
    values = dict(zip(references, ray.get(references, timeout=FETCH_S), strict=True)) if references else {}
    field_values = [values[field] if isinstance(field, ray.ObjectRef) else field for field in extra_fields]
    return [
        Extras(position_ids=position_ids, multi_modal_inputs=image_inputs)
        for position_ids, image_inputs in zip(field_values[::2], field_values[1::2], strict=True)
    ]


def layers_of(extras: Sequence[Extras | None]) -> int:
    """The layers of positions that a rank's rows have; 0: no row has extras."""
    return max((len(row_extra.position_ids) for row_extra in extras if row_extra is not None), default=0)


def text_extras(num_tokens: int, layers: int = 1) -> Extras:
    """Those of a sequence without images."""
    return Extras(position_ids=np.tile(np.arange(num_tokens), (layers, 1)), multi_modal_inputs={})


def completed(sequences: Sequence[np.ndarray], extras: Sequence[Extras | None], layers: int) -> list[Extras]:
    """Extras of all sequences, of which the first have these; none at all without layers."""
    if not layers:
        return []
    padded_extras = [*extras, *[None] * (len(sequences) - len(extras))]
    return [extra or text_extras(len(tokens), layers) for tokens, extra in zip(sequences, padded_extras, strict=True)]
