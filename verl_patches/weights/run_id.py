"""Tells the runs of one machine apart where verl tells only the jobs of one Ray apart: the sockets that carry weights.

Contract:
1. The entry program calls ``name_run`` before Ray starts. Ray's workers and their children inherit the name, by the
   variable ``RUN`` of the environment; where it is not set, nothing here changes anything.
2. The receiving engine (``mark_engine``, by the plugin in vLLM) and the sending worker (``of_this_run``) put it into
   the path of their socket, so the name is given only where vLLM loads the plugin.

Symptom: two runs on one machine, each with a Ray of its own, bind and remove the same socket in /tmp. Updates that
overlap fail, hang, or load the other run's weights.
Upstream: ``ServerAdapter.zmq_handle`` and ``vLLMColocateWorkerExtension._get_zmq_handle`` (verl 0.9.1) take Ray's job
id into the path, which counts from 1 in every Ray.
Delete: when that path is the machine's only one.
"""

from __future__ import annotations

import os
import uuid
from importlib.metadata import entry_points

RUN = "VERL_PATCHES_RUN"
JOB = "VERL_RAY_JOB_ID"
"""verl's, set for an engine by its server; the engine's part of the path."""


def name_run() -> None:
    """Names this run in the environment, if vLLM loads the plugin there."""
    allowed_plugins = os.environ.get("VLLM_PLUGINS")
    plugin_names = {
        point.name for point in entry_points(group="vllm.general_plugins") if point.module == "verl_patches.vllm_plugin"
    }
    os.environ.pop(RUN, None)
    if plugin_names and (allowed_plugins is None or plugin_names & set(allowed_plugins.split(","))):
        os.environ[RUN] = uuid.uuid4().hex[:8]


def mark_engine() -> None:
    """Adds the run's name to what this engine process takes for the job; safe to call again."""
    run_name, job_id = os.environ.get(RUN), os.environ.get(JOB)
    if run_name and job_id and not job_id.endswith(f"-{run_name}"):
        os.environ[JOB] = f"{job_id}-{run_name}"


def of_this_run(socket_handle: str) -> str:
    """The sender's socket as ``mark_engine`` makes the engine look for it; safe to call again."""
    run_name = os.environ.get(RUN)
    if not run_name or f"-{run_name}-replica-" in socket_handle:
        return socket_handle
    return socket_handle.replace("-replica-", f"-{run_name}-replica-", 1)
