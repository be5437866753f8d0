"""What commands say."""

import time


def say(line: str) -> None:
    """A progress line."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)
