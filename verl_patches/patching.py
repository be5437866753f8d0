"""The form of a patch: one function, applied once, loud when its target has moved.

Contract:
1. A function under ``patch`` takes what upstream has and returns what takes its place. Called without an argument, it
   puts that there, and returns False if it is there already; only then is the upstream module imported.
2. It raises ``PatchTargetMoved``, naming the symbol, when the target is absent or its parameters differ.
3. ``original`` gives back what was there before.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

_PATCH = "__verl_patches_name__"


class PatchTargetMoved(RuntimeError):
    """The upstream symbol that a patch replaces is not the one the patch was written for."""


def patch(
    symbol: str, *parameters: str, if_imported: bool = False
) -> Callable[[Callable[..., Any]], Callable[[], bool]]:
    """Makes a patch of ``symbol``, e.g. ``"verl.protocol:DataProto.union"``, which has these parameters upstream.

    With ``if_imported`` nothing is patched in a process that has not imported the module.
    """
    module_name, attribute_path = symbol.split(":")
    *owner_path, name = attribute_path.split(".")

    def decorate(make: Callable[[Callable], Callable]) -> Callable[[], bool]:
        @functools.wraps(make)
        def apply() -> bool:
            if if_imported and module_name not in sys.modules:
                return False
            owner = functools.reduce(getattr, owner_path, importlib.import_module(module_name))
            return replace(owner, name, parameters, make)

        return apply

    return decorate


def replace(owner: Any, name: str, parameters: tuple[str, ...], make: Callable[[Callable], Callable]) -> bool:
    """Replaces function ``owner.name`` by ``make(upstream)``; returns False if this patch is already there.

    ``parameters`` are the names of the parameters that the patch was written for.
    """
    symbol = f"{getattr(owner, '__module__', '') + '.' if inspect.isclass(owner) else ''}{owner.__name__}.{name}"
    upstream = getattr(owner, name, None)
    if upstream is None:
        raise PatchTargetMoved(f"{symbol} does not exist any more: adapt or delete the patch {make.__qualname__}")
    patch_name = f"{make.__module__}.{make.__qualname__}"
    if getattr(upstream, _PATCH, None) == patch_name:
        return False
    found = tuple(inspect.signature(upstream).parameters)
    if found != parameters:
        raise PatchTargetMoved(
            f"{symbol} has parameters {found}, the patch {patch_name} was written for {parameters}: adapt or delete it"
        )
    replacement = functools.wraps(upstream)(make(upstream))
    setattr(replacement, _PATCH, patch_name)
    setattr(owner, name, replacement)
    return True


def original(function: Callable) -> Callable:
    """The upstream function behind a patched one; an unpatched one comes back as it is."""
    return function.__wrapped__ if hasattr(function, _PATCH) else function
