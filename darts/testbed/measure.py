"""Measures a testbed: ``python -m darts.testbed.measure --testbed overthink``.

Samples groups of responses to train prompts with the committed (or another) model, prints a table
with 95 % intervals, writes it as JSON, and checks the testbed's bounds; exit code 1 if one fails.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, Qwen2ForCausalLM

from darts.testbed import LIMITS, assets_dir
from darts.testbed.model import prompt_tokens
from darts.testbed.reward import compute_score
from darts.testbed.summary import Samples, checks, pool, summarize, table

BATCH = 256
"""Responses sampled at a time."""
_COMPACT_BELOW = 0.9
"""Share of running rows below which the finished ones leave the batch: leaving copies the cache."""


@torch.inference_mode()
def sample(
    model: Qwen2ForCausalLM, prompts: list[list[int]], limit: int, generator: torch.Generator
) -> list[list[int]]:
    """Samples one response per prompt, at temperature 1 and top_p 1: a plain batched sampler, no engine.

    Finished rows leave the batch, so a long tail costs little.

    Args:
        model: The model; its generation config names the end-of-sequence token.
        prompts: Prompt tokens, all of one length (so that nothing has to be padded).
        limit: Most tokens of a response, the end-of-sequence token included.
        generator: Source of all randomness.

    Returns:
        Response tokens in the order of `prompts`; a response that reached `limit` without an
        end-of-sequence token simply ends.
    """
    if len({len(prompt) for prompt in prompts}) > 1:
        raise ValueError(f"prompt lengths {sorted({len(p) for p in prompts})} must be equal")
    end_token = model.generation_config.eos_token_id
    responses: list[list[int]] = [[] for _ in prompts]
    running_rows = torch.arange(len(prompts))
    is_running = torch.ones(len(prompts), dtype=torch.bool)
    tokens: Tensor = torch.tensor(prompts)
    cache = DynamicCache(config=model.config)
    for _ in range(limit):
        logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        tokens = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        for row, token, row_runs in zip(running_rows.tolist(), tokens[:, 0].tolist(), is_running.tolist(), strict=True):
            if row_runs:
                responses[row].append(token)
        is_running &= tokens[:, 0] != end_token
        if not is_running.any():
            break
        if is_running.float().mean() < _COMPACT_BELOW:
            cache.batch_select_indices(is_running.nonzero()[:, 0])
            running_rows, tokens, is_running = running_rows[is_running], tokens[is_running], is_running[is_running]
    return responses


def collect(folder: Path, limit: int, groups: int, size: int, seed: int, split: str = "train") -> dict[int, Samples]:
    """Samples `size` responses to the first `groups` prompts of each difficulty class, which is the key.

    Args:
        folder: A testbed's folder, as `darts.testbed.make` writes it.
        limit: Response limit in tokens.
        groups: Prompts per class; fewer if the split has fewer.
        size: Responses per prompt.
        seed: Seed of the sampling.
        split: ``train`` or ``val``.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    rows = pyarrow.parquet.read_table(folder / f"{split}.parquet").to_pylist()
    generator, rows_at_once = torch.Generator().manual_seed(seed), max(1, BATCH // size)
    samples_by_class = {}
    for difficulty in sorted({row["extra_info"]["difficulty"] for row in rows}):
        chosen_rows = [row for row in rows if row["extra_info"]["difficulty"] == difficulty][:groups]
        outcomes = []  # length, score, whether truncated
        start_s = time.monotonic()
        for first_row in range(0, len(chosen_rows), rows_at_once):
            batch_rows = [row for row in chosen_rows[first_row : first_row + rows_at_once] for _ in range(size)]
            prompts = [prompt_tokens(tokenizer, row["prompt"][0]["content"]) for row in batch_rows]
            for row, response in zip(batch_rows, sample(model, prompts, limit, generator), strict=True):
                response_text = tokenizer.decode(response, skip_special_tokens=True)
                score = compute_score(row["data_source"], response_text, row["reward_model"]["ground_truth"])["score"]
                outcomes.append((len(response), score, response[-1] != tokenizer.eos_token_id))
        lengths, correct, truncated = np.array(outcomes, dtype=float).T.reshape(3, len(chosen_rows), size)
        samples_by_class[difficulty] = Samples(lengths=lengths, correct=correct, truncated=truncated)
        tokens_per_s = lengths.sum() / (time.monotonic() - start_s)
        print(f"{difficulty} numbers: {len(outcomes)} responses, {tokens_per_s:,.0f} tokens/s", flush=True)
    return samples_by_class


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", choices=sorted(LIMITS), required=True)
    parser.add_argument("--dir", type=Path, help="folder that `make` wrote (default: the committed one)")
    parser.add_argument("--groups", type=int, default=160, help="prompts per class (default: %(default)s)")
    parser.add_argument("--size", type=int, default=16, help="responses per prompt (default: %(default)s)")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the numbers (default: nowhere)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    folder = options.dir or assets_dir(options.testbed)
    length_limit = LIMITS[options.testbed].response
    samples = collect(folder, length_limit, options.groups, options.size, options.seed, options.split)
    classes = {difficulty: summarize(class_samples, options.seed) for difficulty, class_samples in samples.items()}
    overall_summary = summarize(pool(samples), options.seed)
    required_checks = checks(options.testbed, overall_summary, classes)

    print(f"\n{options.testbed}, limit {length_limit} tokens, {options.split} prompts, seed {options.seed}\n")
    print(table(overall_summary, classes), end="\n\n")
    print("\n".join(map(str, required_checks)))
    if options.json:
        json_document = {
            "testbed": options.testbed,
            "response_limit": length_limit,
            "split": options.split,
            "seed": options.seed,
            "overall": asdict(overall_summary),
            "classes": {str(difficulty): asdict(summary) for difficulty, summary in classes.items()},
            "checks": [asdict(check) | {"passed": check.passed} for check in required_checks],
        }
        options.json.write_text(json.dumps(json_document, indent=1) + "\n")
    return 0 if all(check.passed for check in required_checks) else 1


if __name__ == "__main__":
    sys.exit(main())
