"""The form of a patch: one function, applied once, loud when its target has moved.

Contract:
1. ``replace`` raises ``PatchTargetMoved``, naming the symbol, when the target is absent or its parameters differ.
2. A second ``replace`` of the same target by the same patch does nothing; ``original`` gives back what was there
   before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_ORIGINAL = "__verl_patches_original__"
_PATCH = "__verl_patches_name__"


class PatchTargetMoved(RuntimeError):
    """The upstream symbol that a patch replaces is not the one the patch was written for."""


def replace(owner: Any, name: str, parameters: tuple[str, ...], make: Callable[[Callable], Callable]) -> bool:
    """Replace function ``owner.name`` by ``make(upstream)``; return False if this patch is already there.

    ``parameters`` are the names of the parameters that the patch was written for.
    """
    symbol = f"{getattr(owner, '__module__', '') + '.' if inspect.isclass(owner) else ''}{owner.__name__}.{name}"
    upstream = getattr(owner, name, None)
    if upstream is None:
        raise PatchTargetMoved(f"{symbol} does not exist any more: adapt or delete the patch {make.__qualname__}")
    patch = f"{make.__module__}.{make.__qualname__}"
    if getattr(upstream, _PATCH, None) == patch:
        return False
    found = tuple(inspect.signature(upstream).parameters)
    if found != parameters:
        raise PatchTargetMoved(
            f"{symbol} has parameters {found}, the patch {patch} was written for {parameters}: adapt or delete it"
        )
    replacement = functools.wraps(upstream)(make(upstream))
    setattr(replacement, _ORIGINAL, upstream)
    setattr(replacement, _PATCH, patch)
    setattr(owner, name, replacement)
    return True


def original(function: Callable) -> Callable:
    """The upstream function behind a patched one; an unpatched one comes back as it is."""
    return getattr(function, _ORIGINAL, function)
