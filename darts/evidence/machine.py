"""What figures belong to: machine, versions, commit, date.

Contract: standard library alone, so that it is fast. What cannot be found out is `unknown`; nothing raises.
"""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"
PACKAGES = ("verl", "vllm", "torch", "ray")


def machine(environment: tuple[str, ...] = ()) -> dict[str, Any]:
    """For JSON; to be called before anything is measured, for the machine's load. `environment`: variables whose
    values belong to the figures.

    Example:
        {"date": "2026-11-21T19:41:01+00:00", "commit": "2a674a9eb1...", "changed_files": [], "cores": 2, "processor":
        "...", "architecture": "x86_64", "load": [0.1, 0.2, 0.1], "python": "3.11.7", "verl": "0.9.1", ...}
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain").splitlines(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "architecture": platform.machine(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        **{name: installed(name) or UNKNOWN for name in PACKAGES},
        "environment": {name: os.environ.get(name) for name in environment},
    }


def _git(*arguments: str) -> str:
    try:
        git_run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return UNKNOWN
    return git_run.stdout.rstrip() if git_run.returncode == 0 else UNKNOWN


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or UNKNOWN
