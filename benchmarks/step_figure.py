"""Draws a step of a real run: what became of the candidates of some prompts, and what the actor did meanwhile.

    .venv/bin/python -m benchmarks.step_figure                       the figure of docs/how_it_works.md again
    .venv/bin/python -m benchmarks.step_figure --run outputs/quickstart --step 8 --prompts 0 3 5

Contract. Draws `--data`, the extract of one step. With `--run` it is made first: of a run with the manager of
`benchmarks.step_record`, whose docstring has the command. Every time is the recorded one; the phases after generation
are known by their seconds alone, and are laid end to end in the trainer's order.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from darts.machine import machine
from darts.report import INSIDE_STEP, Step, find_file

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
RECORDS = "candidates.jsonl"
MACHINE = ("date", "commit", "cores", "python", "verl", "vllm", "torch")


def extract(run: Path, number: int, prompts: Sequence[int]) -> dict[str, Any]:
    """What the figure needs of a step.

    Raises:
        ValueError: the run has no such step, or was recorded without candidates.
    """
    trace = find_file(run)
    steps, records = (
        {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}
        for path in (trace, trace.with_name(RECORDS))
    )
    if number not in steps or number not in records:
        raise ValueError(f"--step {number}: must be a recorded one, of {', '.join(map(str, sorted(records)))}.")
    record = records[number]
    chosen = [at for at, prompt in enumerate(record["prompt"]) if prompt in prompts]
    if set(prompts) - set(record["prompt"]):
        raise ValueError(f"--prompts {' '.join(map(str, prompts))}: must lie in 0 to {max(record['prompt'])}.")
    columns = {name: [values[at] for at in chosen] for name, values in record.items() if isinstance(values, list)}
    timed = {f"timing_s/{name}" for name in ("step", *INSIDE_STEP)}
    found = machine()
    return {
        "machine": {name: found[name] for name in MACHINE},
        "step": number,
        "seconds": record["seconds"],
        "prompts": len(set(record["prompt"])),
        "metrics": {name: value for name, value in steps[number]["metrics"].items() if name in timed},
        "calls": steps[number]["timeline"]["calls"],
        **columns,
    }


def complete_at(data: dict[str, Any], prompt: int) -> float:
    """When a group was decided: nothing runs any more that was not asked to abort."""
    return max(
        ended for of, ended, stop in zip(data["prompt"], data["ended"], data["stop"], strict=True)
        if of == prompt and stop is None
    )  # fmt: skip


def kinds(data: dict[str, Any]) -> list[str]:
    """What became of each candidate: short, long (kept), dropped, aborted, or truncated (and dropped)."""
    names = {"d": "dropped", "a": "aborted", "t": "truncated", "x": "lost", "f": "short"}
    found = [names.get(fate, "short") for fate in data["fate"]]
    for prompt in set(data["prompt"]):
        kept = [at for at, of in enumerate(data["prompt"]) if of == prompt and data["fate"][at] == "k"]
        kept.sort(key=lambda at: (data["length"][at], at))
        for at in kept[len(kept) - data["num_long"][kept[0]] :] if kept else []:
            found[at] = "long"
    return found


def draw(data: dict[str, Any]) -> bytes:
    """The figure as PNG."""
    from benchmarks.step_drawing import figure_of
    from darts.report_figures import draw_all

    (drawn,) = draw_all({"step": ("A step", figure_of)}, data)
    return drawn.png


def step_of(data: dict[str, Any]) -> Step:
    """The step as `darts.report` has it."""
    return Step(number=data["step"], values=data["metrics"], rollout=None)


def in_rollout(data: dict[str, Any]) -> tuple[float, float]:
    """Of the kept tokens shown: the share whose log-probs were there when the rollout ended, and when their own
    response had."""
    within = own = total = 0
    for fate, length, ended, parts in zip(
        data["fate"], data["length"], data["ended"], data["computed"], strict=True
    ):  # fmt: skip
        if fate in "kf":
            total += length
            within += sum(tokens for at, tokens in parts if at <= data["seconds"])
            own += sum(tokens for at, tokens in parts if at <= ended)
    return within / total, own / total


def main(given: Sequence[str] | None = None) -> int:
    """The command."""
    options = parse(given)
    if options.run is not None:
        try:
            data = extract(options.run, options.step, options.prompts)
        except (OSError, ValueError) as error:
            print(f"no figure: {error}", file=sys.stderr)
            return 2
        rows = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in data.items()]
        options.data.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    options.out.write_bytes(draw(json.loads(options.data.read_text())))
    print(options.out)
    return 0


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="DIR", help="a recorded run, to take the step from")
    parser.add_argument("--step", type=int, default=1, metavar="N", help="of the run (default: %(default)s)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="positions in the batch")
    parser.add_argument("--data", type=Path, default=FOLDER / "step.json", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=FOLDER / "step.png", metavar="FILE", help="default: %(default)s")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
