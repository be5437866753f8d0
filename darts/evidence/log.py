"""The logger `darts`: every line that a run says begins with `[darts]`.

Contract: importing this module sets the logger up, once per process, those of Ray included. It hands nothing to the
root logger, so that no line comes twice. Refusals and errors go to stderr, all else to stdout, each line at once.
`DARTS_LOG_LEVEL` says from which level on. Modules below this one ask for `logging.getLogger("darts")`.
"""

import argparse
import logging
import os
import sys
import time
from typing import NoReturn


class LineHandler(logging.StreamHandler):
    """Writes lines to what `sys.stdout` and `sys.stderr` are at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Upstream: `logging.StreamHandler.emit`."""
        self.stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        super().emit(record)


logger = logging.getLogger("darts")
logger.handlers = [LineHandler()]
logger.handlers[0].setFormatter(logging.Formatter("[darts] %(message)s"))
logger.propagate = False


def refuse(reason: object) -> NoReturn:
    """Ends the program with the one line that says what is wrong."""
    logger.error(reason)
    sys.exit(2)


class OptionParser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Upstream: `argparse.ArgumentParser.error`."""
        refuse(f"{' '.join(message.split())}; --help lists the options.")


def say(line: str) -> None:
    """Logs how far a long command is, with the time."""
    logger.info(f"{time.strftime('%H:%M:%S')} {line}")


LEVEL = os.environ.get("DARTS_LOG_LEVEL", "INFO")
try:
    logger.setLevel(LEVEL.upper())
except ValueError:
    refuse(f"DARTS_LOG_LEVEL={LEVEL!r}: must be one of DEBUG, INFO, WARNING, ERROR. Fix: unset it, for INFO.")
