r"""The datasets that `prepare.py` knows, as they are published: where, with what columns, and how a row is read.

The schemas are those of the datasets' cards, of verl's examples/data_preprocess and recipe/dapo/prepare_dapo_data.sh,
and of verl's scorers. Instructions name what the scorer looks for. `data_source` is the key by which verl finds the
scorer, not always the dataset's own name. Columns are by kind (`KINDS` in `prepare.py`).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Example = Mapping[str, Any]

IMAGE = "<image>"  # stands for an image in a prompt of verl


class UnusableRow(Exception):
    """A row to be dropped, with the reason by which it is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRow:
    """A prompt: ``PreparedRow(question="1 + 1?", prompt=user("1 + 1?"), answer="2", data_source="math_dapo")``."""

    question: str  # the prompt without instructions: by it copies are found
    prompt: list[dict[str, str]]
    answer: str  # the ground truth, as the scorer of `data_source` wants it
    data_source: str
    ability: str = "math"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file to be written, and what it is read from."""

    name: str  # of the file, without .parquet
    hub: str  # the canonical dataset
    columns: Mapping[str, str]  # what is needed, e.g. {"problem": "text", "reward_model.ground_truth": "text"}
    read: Callable[..., PreparedRow]  # of a row of the source; may raise `UnusableRow`
    split: str | None = None  # of the source. None: train, or the only one
    config: str | None = None  # of the dataset, where it has several


def parts(*names: str, **fields: Any) -> tuple[Part, ...]:
    """Files that are called like the splits they are read from; the other fields of `Part` are those of all."""
    return tuple(Part(name=name, split=name, **fields) for name in names)


def user(text_content: str) -> list[dict[str, str]]:
    """A prompt of one message."""
    return [{"role": "user", "content": text_content}]


def text(example: Example, column_path: str) -> str:
    """The text at a dotted path, without surrounding white space; empty where there is none."""
    field_value: Any = example
    for name in column_path.split("."):
        field_value = None if field_value is None else field_value[name]
    return (field_value or "").strip()


# --- a question and an answer, each in a column of text --------------------------------------------------------------


def problems(
    hub: str,
    question: str,
    answer: str,
    template: str,
    *,
    find: Callable[[str], str] = str,
    lacking: str = "",
    data_source: str | None = None,
    more_columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The fields of `Part` for such a dataset. `template` has `{}` for the question, `find` finds the answer in its
    column, and `lacking` is why a row is dropped where it does not. Images that no `<image>` stands for come first."""

    def read(example: Example) -> PreparedRow:
        problem, found_answer = text(example, question), find(text(example, answer))
        if lacking and not found_answer:
            raise UnusableRow(lacking)
        num_images = 0 if IMAGE in problem else len(example.get("images") or ())
        prompt = user(IMAGE * num_images + template.format(problem))
        return PreparedRow(question=problem, prompt=prompt, answer=found_answer, data_source=data_source or hub)

    return {"hub": hub, "columns": {question: "text", answer: "text"} | (more_columns or {}), "read": read}


def final_number(solution: str) -> str:
    """The number after the hashes at the end, without commas; empty if there is none."""
    found_number = re.search(r"####\s*\$?\s*(-?[\d,]*\.?\d+)\.?\s*$", solution)
    return found_number[1].replace(",", "") if found_number else ""


def last_boxed(solution: str) -> str:
    r"""What the last ``\boxed{...}``, ``\boxed x`` or ``\fbox{...}`` holds; empty if there is none, or no end to it."""
    _, found_box, box_content = solution.rpartition(r"\boxed" if r"\boxed" in solution else r"\fbox")
    box_content = box_content.lstrip() if found_box else ""
    if not box_content.startswith("{"):
        return box_content.split("$")[0].strip()
    brace_depth = 0
    for end, character in enumerate(box_content):
        brace_depth += (character == "{") - (character == "}")
        if brace_depth == 0:
            return box_content[1:end].strip()
    return ""


# --- DAPO-Math-17k and AIME-2024, which come with instructions in the prompt -----------------------------------------


LINE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
"""The prompt in both datasets: verl's `math_dapo` looks for a line `Answer: ...`."""
LINE_PATTERN = re.compile(re.escape(LINE).replace(r"\{\}", "(.*)"), re.DOTALL)
BOXED = "{}\n\nThink step by step. The last line of your response must be\nAnswer: \\boxed{{your answer}}"
r"""For answers in LaTeX: verl's `math_reward` looks for \boxed{} and, unlike `math_dapo`, knows that \dfrac is \frac.
`math_dapo` understands such a line too, so that training and validation have the same prompt."""


def instructed(name: str, hub: str, template: str, data_source: str) -> Part:
    """A file of rows of one of both, with the instructions of a template for theirs."""

    def read(example: Example) -> PreparedRow:
        prompt_messages = example["prompt"] or []
        if len(prompt_messages) != 1:
            raise UnusableRow("with another number of messages than one")
        prompt_text, answer = text(prompt_messages[0], "content"), text(example, "reward_model.ground_truth")
        template_match = LINE_PATTERN.fullmatch(prompt_text)
        question = template_match[1].strip() if template_match else prompt_text
        prompt = user(template.format(question))
        return PreparedRow(question=question, prompt=prompt, answer=answer, data_source=data_source)

    return Part(name=name, hub=hub, columns={"prompt": "messages", "reward_model.ground_truth": "text"}, read=read)


def aime2024(template: str) -> Part:
    """The validation set; verl scores a data source whose name begins with ``aime`` with `math_dapo`."""
    return instructed("aime2024", "BytedTsinghua-SIA/AIME-2024", template, "aime2024")


# --- Eurus-2-RL-Data: code, whose answers are tests, and math --------------------------------------------------------


EURUS_SOURCES = {
    "code": {"apps", "codecontests", "codeforces", "taco"},
    "math": {
        "numina_amc_aime", "numina_aops_forum", "numina_cn_k12", "numina_olympiads", "numina_synthetic_amc",
        "numina_synthetic_math",
    },
}  # fmt: skip
"""What verl scores, by ability."""
EURUS_INSTRUCTIONS = {
    "code": (
        "```python",
        "\n\nWrite a program in Python. Put all of it, at the end, in one block:\n```python\n...\n```",
    ),
    "math": (r"\boxed", "\n\nPut the final answer, in LaTeX, in \\boxed{}."),
}
"""What a prompt must name, and what is added to one that does not."""


def read_eurus(example: Example, wanted: str = "code") -> PreparedRow:
    """A row of one ability, or of all; prompts stay as published, with their system message."""
    ability, data_source = text(example, "ability"), text(example, "data_source")
    if wanted not in (ability, "all"):
        raise UnusableRow(f"of ability {ability or 'none'}")
    if data_source not in EURUS_SOURCES.get(ability, ()):
        raise UnusableRow(f"of a data source that verl does not score as {ability or 'none'}")
    prompt = [{name: text(message, name) for name in ("role", "content")} for message in example["prompt"] or ()]
    if not prompt or prompt[-1]["role"] != "user":
        raise UnusableRow("without a last message of the user")
    question = prompt[-1]["content"]
    required_mark, added_instruction = EURUS_INSTRUCTIONS[ability]
    if question and required_mark not in question:
        prompt[-1]["content"] += added_instruction
    answer = text(example, "reward_model.ground_truth")
    if ability == "code" and answer:
        answer = runnable(answer)
    return PreparedRow(question=question, prompt=prompt, answer=answer, data_source=data_source, ability=ability)


def runnable(published: str) -> str:
    """The tests as verl's scorers run them: verl 0.9.1 wants each input and output as text, and for a function
    (`fn_name`) one line of JSON an argument. As lists, which is how functions are published, they score 0 whatever the
    response.

    Raises:
        UnusableRow: not JSON, no tests, or inputs that cannot be given.
    """
    try:
        tests = json.loads(published)
        inputs, outputs, function_name = tests["inputs"], tests["outputs"], tests.get("fn_name")
        if not (isinstance(inputs, list) and isinstance(outputs, list)):
            raise TypeError
        as_text = _call if function_name else _lines
        test_pairs = [as_text(*test_pair) for test_pair in zip(inputs, outputs, strict=True)]
        inputs, outputs = zip(*test_pairs, strict=True)  # an error where there are none
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise UnusableRow("with tests that verl cannot run") from None
    return json.dumps(({"fn_name": function_name} if function_name else {}) | {"inputs": inputs, "outputs": outputs})


def _lines(*test_pair: Any) -> tuple[str, ...]:
    """What is given to, and expected from, a program."""
    if any(test_value is None or isinstance(test_value, dict) for test_value in test_pair):
        raise TypeError
    return tuple("\n".join(_lines(*value)) if isinstance(value, list) else str(value) for value in test_pair)


def _call(call_arguments: Any, expected_value: Any) -> tuple[str, str]:
    """What is given to, and expected from, a function."""
    if isinstance(call_arguments, list) and call_arguments:
        return "\n".join(map(json.dumps, call_arguments)), json.dumps(expected_value)
    for json_line in [*call_arguments.split("\n"), expected_value]:
        json.loads(json_line)
    return call_arguments, expected_value


# --- the table -------------------------------------------------------------------------------------------------------


MATH = "DigitalLearningGmbH/MATH-lighteval"
DEEPMATH, DEEPSCALER = "zwhe99/DeepMath-103K", "agentica-org/DeepScaleR-Preview-Dataset"
DATASETS: dict[str, tuple[str, Part, Part]] = {
    "gsm8k": (
        """GSM8K. Scored by verl's `gsm8k`, which compares the number after `####` as text, without commas.
        Dropped: solutions without one.""",
        *parts("train", "test", config="main", **problems(
            "openai/gsm8k", "question", "answer",
            '{}\n\nThink step by step. Write the final answer, the number alone, after "####" on the last line.',
            find=final_number, lacking="without a number after ####",
        )),
    ),
    "math_lighteval": (
        r"""MATH (Hendrycks et al.). Scored by verl's `math_reward`, which compares what stands in the last \boxed{}.
        Dropped: solutions without one.""",
        *parts("train", "test", **problems(
            MATH, "problem", "solution", "{}\n\nThink step by step, and put the final answer in \\boxed{{}}.",
            find=last_boxed, lacking=r"without \boxed{} in the solution",
        )),
    ),
    "dapo_math": (
        """DAPO-Math-17k, validated on AIME-2024. Scored by verl's `math_dapo`: 1 or -1 for a line `Answer: ...`. The
        published file has each of its 17,917 rows 100 times, some with the same problem again, and AIME-2024 32 times:
        verl's `actor_rollout_ref.rollout.val_kwargs.n=32` samples each of the 30 problems as often. A file of your own
        needs `prompt`, a list of one message {role, content}, and `reward_model`, with the answer, an integer as text,
        in `ground_truth`.""",
        instructed("train", "BytedTsinghua-SIA/DAPO-Math-17k", LINE, "math_dapo"), aime2024(LINE),
    ),
    "deepmath": (
        r"""DeepMath-103K, validated on AIME-2024. Scored by verl's `math_reward` (the last \boxed{}), which verl finds
        by the data source of MATH. The solutions of R1 are not used.""",
        Part(name="train", **problems(DEEPMATH, "question", "final_answer", BOXED, data_source=MATH)), aime2024(BOXED),
    ),
    "deepscaler": (
        r"""DeepScaleR-Preview, validated on AIME-2024. Scored by verl's `math_reward` (the last \boxed{}), which verl
        finds by the data source of MATH. A few rows have no answer.""",
        Part(name="train", **problems(DEEPSCALER, "problem", "answer", BOXED, data_source=MATH)), aime2024(BOXED),
    ),
    "geo3k": (
        r"""Geometry3K, with images. Scored by verl's `geo3k` (needs the package mathruler): 0.9 for the right answer in
        \boxed{}, 0.1 for the reasoning in <think>. The same question about another image is another prompt.""",
        *parts("train", "test", **problems(
            "hiyouga/geometry3k", "problem", "answer", "{}\n\nBegin with your reasoning between <think> and </think>. "
            "Then give the final answer in \\boxed{{}}.", more_columns={"images": "images"},
        )),
    ),
    "eurus2": (
        r"""Eurus-2-RL-Data: code, math, or both. Code is scored by verl's `prime_code`, which runs the last ```python
        block against the tests, math by `prime_math` on \boxed{}. Tests are rewritten as verl runs them; dropped are
        those that it cannot run. Of a problem that comes again with other tests the first are kept. Not for functions:
        a sandbox (`reward.sandbox_fusion.url`), which compares what is printed, `4`, with the text of the list,
        `[4]`.""",
        *parts("train", "validation", hub="PRIME-RL/Eurus-2-RL-Data", read=read_eurus, columns={
            "data_source": "text", "prompt": "messages", "ability": "text", "reward_model.ground_truth": "text",
        }),
    ),
}  # fmt: skip
"""By name: what `prepare.py NAME --help` says, the file to train on, the file to validate on."""
