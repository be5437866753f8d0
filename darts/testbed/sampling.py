"""A plain batched sampler for the tiny model: temperature 1, all tokens, no engine."""

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2ForCausalLM

_COMPACT_BELOW = 0.9
"""Share of running rows below which the finished ones leave the batch: leaving copies the cache."""


@torch.inference_mode()
def sample(
    model: Qwen2ForCausalLM, prompts: list[list[int]], limit: int, generator: torch.Generator
) -> list[list[int]]:
    """Samples one response per prompt, at temperature 1 and top_p 1.

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
