"""Prints the versions that matter; with --load, imports verl and fails unless the plugin is active in it."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTIONS = ("verl-darts", "verl", "torch", "vllm", "ray", "transformers", "tensordict", "numpy")


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True, choices=("cpu", "gpu"))
    parser.add_argument("--load", action="store_true")
    args = parser.parse_args()

    versions = {name: installed(name) for name in DISTRIBUTIONS}
    rows = {"python": platform.python_version(), **versions, "device": args.device}
    for name, value in rows.items():
        print(f"  {name:<14}{value}")
    missing = [name for name, value in versions.items() if value == "missing"]
    if missing:
        print(f"missing: {', '.join(missing)}; run scripts/setup.sh --force", file=sys.stderr)
        return 1

    if args.load:
        import verl  # noqa: F401

        loaded = "verl_patches.register" in sys.modules
        from verl_patches import register  # raises what verl logs at DEBUG only

        if not loaded:
            print("verl did not load the plugin: is VERL_USE_EXTERNAL_PLUGINS set?", file=sys.stderr)
            return 1
        register.assert_active()
        print("  plugin        active")
    return 0


if __name__ == "__main__":
    sys.exit(main())
