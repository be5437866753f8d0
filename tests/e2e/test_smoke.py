"""docs/smoke.md is true: its commands, in its order, and the lines that it says come, without a GPU.

The two nodes of the last rung are two Rays on this machine.
"""

import os
import re
import signal
import socket
import subprocess
from dataclasses import dataclass

import pytest
from jobs import ROOT

from verl_patches.device import is_cpu_only

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7000),
    pytest.mark.skipif(not is_cpu_only(), reason="the lines of the page are those of a machine without a GPU"),
]
LIMIT_S = 6000
PAGE = (ROOT / "docs" / "smoke.md").read_text()
VARIABLES = {"PLATFORM": "cpu", "GPUS": "2", "HALF": "1"}
FIGURE = re.compile(r"\d(?:[\d.,:]*\d)?(?:e[-+]\d+)?")


@dataclass(frozen=True)
class Step:
    """A command of the page, and the lines that follow it there."""

    rung: int
    command: str
    lines: tuple[str, ...]


def steps() -> list[Step]:
    """All commands of the rungs that have lines to expect."""
    found = []
    for section in re.split(r"^## (?=\d\.)", PAGE, flags=re.M)[1:]:
        blocks = re.findall(r"```bash\n([^`]*)```\s*```\n(.*?)```", section.split("\n## ")[0], flags=re.S)
        found += [Step(int(section[0]), command, tuple(lines.splitlines())) for command, lines in blocks]
    return found


def pattern(line: str) -> re.Pattern:
    """What a line of the page allows: other figures, any spaces, and anything for `...`."""
    parts = [
        r"\s+".join(FIGURE.pattern.join(map(re.escape, FIGURE.split(word))) for word in part.split())
        for part in line.split("...")
    ]
    return re.compile(r"\s*" + r".*".join(rf"\s*{part}\s*" for part in parts))


def assert_in_order(expected: tuple[str, ...], output: str) -> None:
    lines = iter(output.splitlines())
    for line in expected:
        wanted = pattern(line)
        assert any(wanted.fullmatch(found) for found in lines), (
            f"did not come (in this order): {line}\n{output[-5000:]}"
        )


def run(command: str, out, **variables: str) -> str:
    """A command as a user types it in the repository's folder; its output."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=ROOT, env=environment | VARIABLES | {"DARTS_OUT": str(out)} | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-5000:]
    return output


def test_the_page_has_five_rungs():
    assert [step.rung for step in steps()] == [1, 2, 3, 4, 4, 5, 5]
    assert all(step.lines and "sbatch" not in step.command for step in steps())


@pytest.mark.parametrize(
    ("line", "came", "matches"),
    [
        ("  steps                 2", "  steps                 12", True),
        ("pass  x: 1.000 in [1, 1]", "pass  x: 0.967 in [1, 1]", True),
        ("pass  x: 1.000 in [1, 1]", "fail  x: 0.967 in [1, 1]", False),
        ("weights moved   by at most 2.0e-04", "weights moved by at most 1.0e-03", True),
        ("[darts] plugin active: M=8, ...", "[darts] plugin active: M=4, anything", True),
        ("...", "anything", True),
        ("ok  a", "FAILED  a", False),
    ],
)
def test_figures_may_differ_and_words_may_not(line, came, matches):
    assert bool(pattern(line).fullmatch(came)) == matches


@pytest.mark.parametrize(
    "step",
    [step for step in steps() if step.rung < 5],
    ids=lambda step: f"{step.rung}: {' '.join(step.command.split())}",
)
def test_a_rung_on_one_machine(step, tmp_path):
    assert_in_order(step.lines, run(step.command, tmp_path / "out"))


@pytest.fixture(scope="module")
def two_rays(tmp_path_factory):
    """Two nodes, started by the page's `ray start` lines; the variables of the shell in which the page goes on."""
    (block,) = re.findall(r"```sh\n(export RAY_AUTH_MODE.*?)```", PAGE, flags=re.S)
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    # Ray keeps its token at home.
    shell = {"HEAD": "127.0.0.1", "GPUS": "1", "HOME": str(tmp_path_factory.mktemp("home")), "PATH": os.environ["PATH"]}
    shell |= {name: os.environ[name] for name in ("RAY_TMPDIR", "VERL_PLATFORM") if name in os.environ}
    rays = []
    for line in block.splitlines():
        command = line.split("#")[0].strip().replace("6379", port)
        if command.startswith("export "):
            name, value = command.removeprefix("export ").split("=")
            shell[name] = value.replace("$HEAD", shell["HEAD"])
        elif "ray start" in command:
            # Logical CPUs: verl's actors ask for more than there are.
            command = f"exec {command} --num-cpus=16 --disable-usage-stats"
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            rays.append(subprocess.Popen(["bash", "-c", command], cwd=ROOT, env=shell, start_new_session=True, **pipes))
            assert any("Ray runtime started" in said for said in rays[-1].stdout), command
        else:
            subprocess.run(["bash", "-c", command], cwd=ROOT, env=shell, check=True, capture_output=True, timeout=600)
    assert len(rays) == 2
    yield shell
    for ray in reversed(rays):
        ray.send_signal(signal.SIGTERM)
        try:
            ray.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(ray.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "step", [step for step in steps() if step.rung == 5], ids=lambda step: " ".join(step.command.split())
)
def test_two_nodes_by_hand(step, two_rays, tmp_path):
    assert_in_order(step.lines, run(step.command, tmp_path / "out", **two_rays))
