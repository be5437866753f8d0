"""Makes a testbed from a seed: ``python -m darts.testbed.make --testbed overthink --out DIR``.

Writes ``model/`` (tokenizer and warm-started model), ``train.parquet``, ``val.parquet`` in verl's
format, and ``SHA256SUMS`` over all of them. The problems, the demonstrations and the tokenizer
depend on the seed alone. The weights depend on the order of floating-point sums as well: the same
machine, torch build and number of threads give the same bytes; others give a model that is
statistically alike, not equal.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch

from darts.testbed import LIMITS
from darts.testbed.model import SHAPES, USUAL, build_model, build_tokenizer
from darts.testbed.task import MIXES, Problem, split_problems
from darts.testbed.warmstart import BY_SEGMENTS, Schedule, examples, packed, train

CHECKSUMS = "SHA256SUMS"
TRAIN_PER_CLASS, VAL_PER_CLASS = 400, 50
ROW_TOKENS = {"long": 6144}
"""Tokens of a training step that is one row, with attention by segments, where limits are long."""


def to_table(problems: list[Problem], testbed: str, split: str) -> pa.Table:
    """The problems as rows of verl's RL data format, in the given order."""
    return pa.Table.from_pylist(
        [
            {
                "data_source": f"darts/{testbed}",
                "prompt": [{"role": "user", "content": problem.question}],
                "ability": "arithmetic",
                "reward_model": {"style": "rule", "ground_truth": str(problem.total)},
                "extra_info": {"index": index, "split": split, "difficulty": problem.difficulty},
            }
            for index, problem in enumerate(problems)
        ]
    )


def write_data(testbed: str, seed: int, out: Path) -> frozenset[Problem]:
    """Writes both parquet files; returns the validation problems, which training must not see."""
    split_parts = split_problems(MIXES[testbed], seed, TRAIN_PER_CLASS, VAL_PER_CLASS)
    for split, problems in zip(("train", "val"), split_parts, strict=True):
        pyarrow.parquet.write_table(to_table(problems, testbed, split), out / f"{split}.parquet")
    return frozenset(split_parts[1])


def checksums(folder: Path) -> str:
    """Lines of ``sha256  path`` for every file below `folder` but the checksum file, by path."""
    file_paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    checksum_lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}" for path in file_paths
    ]
    return "\n".join(checksum_lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", choices=sorted(MIXES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, created if missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Schedule().steps, help="training steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    start_s = time.monotonic()
    (options.out / "model").mkdir(parents=True, exist_ok=True)
    held_out = write_data(options.testbed, options.seed, options.out)
    # The model is trained on demonstrations of any but the held-out problems.
    limits, shape = LIMITS[options.testbed], SHAPES.get(options.testbed, USUAL)
    is_long = options.testbed in ROW_TOKENS
    schedule = Schedule(steps=options.steps, rows=1 if is_long else Schedule().rows)
    tokenizer = build_tokenizer(shape)
    model = build_model(tokenizer, options.seed, shape)
    stream = examples(tokenizer, MIXES[options.testbed], limits, options.seed, held_out)
    row_tokens = ROW_TOKENS.get(options.testbed, limits.prompt + limits.response)
    batches = packed(stream, schedule.rows, row_tokens, tokenizer.pad_token_id)
    if is_long:
        model.set_attn_implementation(BY_SEGMENTS)
    train(model, batches, schedule, report=lambda line: print(line, flush=True))
    model.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    for path in options.out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (options.out / CHECKSUMS).write_text(checksums(options.out))
    print(f"{options.testbed} is in {options.out} after {(time.monotonic() - start_s) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
