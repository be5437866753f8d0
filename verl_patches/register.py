"""Entry point of the group ``verl.plugins``: verl imports this module in every process that imports verl.

Contract:
1. The import does the registrations, once per process. It is cheap: no vLLM, no Ray beyond what verl has imported.
2. verl logs a plugin's exception at DEBUG and goes on, so nothing is raised here: the exception is kept in
   the state that ``register()`` answers, its traceback goes to stderr. Entry programs call ``assert_active()``, which
   raises it.
3. verl calls this at the end of ``verl/__init__.py``: only submodules of verl that need no more than that are used.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass
from importlib.metadata import entry_points

GROUP = "verl.plugins"


class PluginNotActive(RuntimeError):
    """verl would run without this plugin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginState:
    """What ``register`` did in this process, e.g. ``PluginState(applied=("cpu platform",), error=None)``."""

    applied: tuple[str, ...] = ()
    error: Exception | None = None


_state: PluginState | None = None


def register() -> PluginState:
    """Register everything for this process; a second call returns the first answer."""
    global _state
    if _state is None:
        try:
            _state = PluginState(applied=_apply())
        except Exception as error:
            _state = PluginState(error=error)
            reason = "".join(traceback.format_exception(error))
            sys.stderr.write(f"verl_patches: the plugin failed in process {os.getpid()}\n{reason}")
    return _state


def _apply() -> tuple[str, ...]:
    """Every registration of the project, in order; returns their names.

    The streaming vLLM server imports vLLM: darts.training.trainer registers it in the process that starts the servers.
    """
    from verl_patches.device import is_cpu_only

    if not is_cpu_only():
        return ()
    from verl_patches import cpu_platform

    return cpu_platform.activate()


def assert_active() -> PluginState:
    """Raise ``PluginNotActive`` if registration failed here or if verl would not load the plugin in other processes."""
    plugin_result = register()
    if plugin_result.error is not None:
        raise PluginNotActive(f"verl_patches failed to register: {plugin_result.error!r}") from plugin_result.error
    if __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
        return plugin_result
    plugin_names = {point.name for point in entry_points(group=GROUP) if point.value.split(":")[0] == __name__}
    if not plugin_names:
        raise PluginNotActive(
            f"no entry point {GROUP!r} names {__name__}: verl's workers would run without it. "
            f"Install the project (uv pip install -e .)."
        )
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and not plugin_names & {plugin_name.strip() for plugin_name in policy.split(",")}:
        raise PluginNotActive(f"VERL_USE_EXTERNAL_PLUGINS={policy!r} switches the plugin {sorted(plugin_names)} off")
    return plugin_result


register()
