r"""Eurus-2-RL-Data for verl: train.parquet and validation.parquet, of code, math, or both.

    .venv/bin/python scripts/data/eurus2.py --ability code

Code is scored by verl's `prime_code`, which runs the last ```python block against the tests, math by `prime_math` on
\boxed{}. The prompts stay as published, with their system message. The tests are JSON. verl 0.9.1 wants each input and
output of them as text, and for a function (`fn_name`) one line of JSON per argument; as lists, which is how functions
are published, they score 0 whatever the response, so they are rewritten. Dropped: tests that cannot be. Of a problem
that comes again with other tests the first are kept. Not for functions: a sandbox
(`reward.sandbox_fusion.url`), which compares what is printed, `4`, with the text of the list, `[4]`.
Schema (card of PRIME-RL/Eurus-2-RL-Data, verl's reward_score): the columns of verl; `ability` is code or math;
`data_source` is one of `SOURCES`; `reward_model.ground_truth` is the answer, or {inputs, outputs, fn_name} in JSON.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from prepare import Example, PreparedRow, UnusableRow, make_parser, parts, run, text

HUB = "PRIME-RL/Eurus-2-RL-Data"
SOURCES = {
    "code": {"apps", "codecontests", "codeforces", "taco"},
    "math": {
        "numina_amc_aime", "numina_aops_forum", "numina_cn_k12", "numina_olympiads", "numina_synthetic_amc",
        "numina_synthetic_math",
    },
}  # fmt: skip
"""What verl scores, by ability."""
INSTRUCTIONS = {
    "code": (
        "```python",
        "\n\nWrite a program in Python. Put all of it, at the end, in one block:\n```python\n...\n```",
    ),
    "math": (r"\boxed", "\n\nPut the final answer, in LaTeX, in \\boxed{}."),
}
"""What a prompt must name, and what is added to one that does not."""
COLUMNS = {"data_source": "text", "prompt": "messages", "ability": "text", "reward_model.ground_truth": "text"}
UNUSABLE = "with tests that verl cannot run"


def read(example: Example, wanted: str) -> PreparedRow:
    ability, data_source = text(example, "ability"), text(example, "data_source")
    if wanted not in (ability, "all"):
        raise UnusableRow(f"of ability {ability or 'none'}")
    if data_source not in SOURCES.get(ability, ()):
        raise UnusableRow(f"of a data source that verl does not score as {ability or 'none'}")
    prompt = [{name: text(message, name) for name in ("role", "content")} for message in example["prompt"] or ()]
    if not prompt or prompt[-1]["role"] != "user":
        raise UnusableRow("without a last message of the user")
    question = prompt[-1]["content"]
    required_mark, added_instruction = INSTRUCTIONS[ability]
    if question and required_mark not in question:
        prompt[-1]["content"] += added_instruction
    answer = text(example, "reward_model.ground_truth")
    if ability == "code" and answer:
        answer = runnable(answer)
    return PreparedRow(question=question, prompt=prompt, answer=answer, data_source=data_source, ability=ability)


def runnable(published: str) -> str:
    """The tests as verl's scorers run them.

    Raises:
        UnusableRow: not JSON, no tests, or inputs that cannot be given.
    """
    try:
        tests = json.loads(published)
    except (ValueError, RecursionError):
        raise UnusableRow(UNUSABLE) from None
    inputs, outputs = (tests.get(name) if isinstance(tests, dict) else None for name in ("inputs", "outputs"))
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not 0 < len(inputs) == len(outputs):
        raise UnusableRow(UNUSABLE)
    function_name = tests.get("fn_name")
    if not function_name:
        return json.dumps({"inputs": [*map(_lines, inputs)], "outputs": [*map(_lines, outputs)]})
    function_calls = [_call(*published_call) for published_call in zip(inputs, outputs, strict=True)]
    given_inputs, expected_outputs = zip(*function_calls, strict=True)
    return json.dumps({"fn_name": function_name, "inputs": given_inputs, "outputs": expected_outputs})


def _lines(test_value: Any) -> str:
    """What is given to, or expected from, a program."""
    if isinstance(test_value, list):
        return "\n".join(map(_lines, test_value))
    if test_value is None or isinstance(test_value, dict):
        raise UnusableRow(UNUSABLE)
    return str(test_value)


def _call(call_arguments: Any, expected_value: Any) -> tuple[str, str]:
    """What is given to, and expected from, a function."""
    if isinstance(call_arguments, list) and call_arguments:
        return "\n".join(map(json.dumps, call_arguments)), json.dumps(expected_value)
    try:
        for json_line in [*call_arguments.split("\n"), expected_value]:
            json.loads(json_line)
    except (AttributeError, TypeError, ValueError):
        raise UnusableRow(UNUSABLE) from None
    return call_arguments, expected_value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("eurus2", __doc__, HUB, HUB)
    parser.add_argument("--ability", choices=["code", "math", "all"], default="code", help="default: %(default)s")
    options = parser.parse_args(arguments)
    read_row = partial(read, wanted=options.ability)
    return run(options, *parts("train", "validation", hub=HUB, columns=COLUMNS, read=read_row))


if __name__ == "__main__":
    sys.exit(main())
