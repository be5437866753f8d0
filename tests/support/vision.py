"""Tiny random vision models with the real processor of Qwen2.5-VL, and verl's own way from images to a model's inputs.

The processor has no videos: transformers wants torchvision for them.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType

import numpy as np

VOCABULARY = 300
PAD, IMAGE, VIDEO, START, END = range(5)
SPECIAL = ["<pad>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
FIRST_WORD = 6
PATCH, MERGE = 4, 2
SQUARE = PATCH * MERGE  # pixels to a side of what becomes one token

_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 500.0},
}  # fmt: skip
_VISION = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
MODELS = {
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {},
        {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 2 * SQUARE,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {"head_dim": 8},
        {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
    ),
}  # fmt: skip


def config_of(name: str):
    """The configuration of a tiny model."""
    import transformers

    kind, text, vision = MODELS[name]
    return getattr(transformers, kind)(
        text_config=_TEXT | text, vision_config=_VISION | vision | {"initializer_range": 0.3}, **_TOKENS
    )


def make_model(name: str, path: Path) -> None:
    """Writes a random model."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config_of(name)).save_pretrained(path)


def make_tokenizer():
    """One token for each word `w6` to `w299`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, "<unk>", *(f"w{number}" for number in range(FIRST_WORD, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=SPECIAL[1:]
    )


def make_processor(tokenizer, name: str = "qwen2_5_vl"):
    """Of Qwen2.5-VL, with the positions of a model bound to it as `verl.utils.hf_processor` does."""
    import transformers
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImagesOnly(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    size = {"shortest_edge": SQUARE**2, "longest_edge": 64 * SQUARE**2}
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=size)
    processor = ImagesOnly(image_processor=images, tokenizer=tokenizer, video_processor=None)
    processor.config = config_of(name)
    model = getattr(transformers, MODELS[name][0].replace("Config", "Model"))
    processor.get_rope_index = MethodType(model.get_rope_index, processor)
    processor.get_vision_position_ids = MethodType(model.get_vision_position_ids, processor)
    return processor


def picture(random, height: int, width: int):
    """Noise; sizes in tokens."""
    from PIL import Image

    return Image.fromarray(random.integers(0, 256, (height * SQUARE, width * SQUARE, 3), dtype=np.uint8))


def span(image) -> list[int]:
    """What stands for an image in a prompt."""
    return [START, *[IMAGE] * (image.width // SQUARE * (image.height // SQUARE)), END]


class Maker:
    """The part of verl's agent-loop worker that makes a model's inputs, without a rollout."""

    def __init__(self, name: str) -> None:
        from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

        self.tokenizer = make_tokenizer()
        self.processor = make_processor(self.tokenizer, name)
        self.mm_processor_kwargs = {}
        for method in ("_compute_multi_modal_inputs", "_compute_position_ids", "_get_mm_processor_kwargs"):
            setattr(self, method, MethodType(getattr(AgentLoopWorker, method), self))

    def output(self, tokens, prompt: int, images: list):
        """What an agent loop returns."""
        from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

        tokens = [int(token) for token in tokens]
        return AgentLoopOutput(
            prompt_ids=tokens[:prompt], response_ids=tokens[prompt:], response_mask=[1] * (len(tokens) - prompt),
            multi_modal_data={"images": images} if images else {}, metrics=AgentLoopMetrics(),
        )  # fmt: skip
