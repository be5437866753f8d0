"""`darts.evidence.log`: where lines go, and that each comes once."""

import logging
import os
import subprocess
import sys

import pytest

from darts.evidence.log import say


def test_errors_go_to_stderr_and_all_else_to_stdout(capsys):
    logger = logging.getLogger("darts")
    logger.info("step 1/2")
    logger.warning("lost")
    logger.error("key='value': rule. Fix: fix.")
    output = capsys.readouterr()
    assert output.out == "[darts] step 1/2\n[darts] lost\n"
    assert output.err == "[darts] key='value': rule. Fix: fix.\n"


def test_a_line_of_a_long_command_has_the_time(capsys):
    say("starting")
    assert capsys.readouterr().out.startswith("[darts] ")


@pytest.mark.parametrize(("level", "said"), [(None, "[darts] all is well\n"), ("warning", "")], ids=["default", "set"])
def test_a_line_comes_once_also_where_root_has_a_handler_and_from_the_level_that_is_set(level, said):
    program = (
        "import logging, sys; logging.basicConfig(level=0, stream=sys.stdout);"
        "import darts.evidence.log; logging.getLogger('darts').info('all is well')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DARTS_LOG_LEVEL"}
    environment |= {} if level is None else {"DARTS_LOG_LEVEL": level}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == (said, "", 0)


def test_a_level_that_is_none_is_one_line():
    command = [sys.executable, "-c", "import darts.evidence.log"]
    result = subprocess.run(command, env=os.environ | {"DARTS_LOG_LEVEL": "loud"}, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("", 2)
    assert result.stderr == (
        "[darts] DARTS_LOG_LEVEL='loud': must be one of DEBUG, INFO, WARNING, ERROR. Fix: unset it, for INFO.\n"
    )
