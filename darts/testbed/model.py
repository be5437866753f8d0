"""The tokenizer and the untrained model of the testbeds; both load offline with the Auto classes.

The tokenizer is byte-level without merges: one byte is one token, the newline included, as verl's
continuous tokens require. Token ids: 0-255 the bytes, then the three ChatML specials.
"""

from dataclasses import dataclass

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The size of a testbed's model; heads have 32 dimensions, as vLLM's attention on CPUs wants it."""

    hidden: int = 128
    intermediate: int = 320
    positions: int = 512


USUAL = ModelShape()
SHAPES = {"long": ModelShape(hidden=96, intermediate=256, positions=2624)}
"""By testbed, where it is not the usual one. A smaller model computes log-probs and updates for less, and decodes
hardly faster: on a CPU, as on a GPU, steps of few sequences are bound by latency."""


def build_tokenizer(shape: ModelShape = USUAL) -> Qwen2Tokenizer:
    """Builds the byte-level tokenizer with its chat template (no default system message)."""
    # Sorted by the byte-level alphabet's code points: any fixed order does.
    vocab = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    return Qwen2Tokenizer(
        vocab=vocab | {token: len(vocab) + index for index, token in enumerate((PAD, START, END))},
        merges=[],
        unk_token=None,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=shape.positions,
    )


def build_model(
    tokenizer: Qwen2Tokenizer,
    seed: int,
    shape: ModelShape = USUAL,
) -> Qwen2ForCausalLM:
    """Builds the untrained model: Qwen2 with 0.8 (`long`: 0.5) million parameters in float32."""
    end_and_padding = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=4,
        num_attention_heads=shape.hidden // 32,
        num_key_value_heads=shape.hidden // 32,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        **end_and_padding,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, **end_and_padding)
    return model


def prompt_tokens(tokenizer: Qwen2Tokenizer, question: str) -> list[int]:
    """The tokens of one user message and the assistant's opening, as the rollout renders them."""
    message = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
