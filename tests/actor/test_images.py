"""Responses about images, through verl's own forward while others have none: equal to verl's full forward.

What goes in is made as in a rollout: by the real processor and verl's methods, without padding for the overlapped
actor, with the agent loop's padding for the full forward.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import vision
from actor_cases import (
    SETTINGS,
    Script,
    calls_of,
    collect,
    dummy_image_again,
    extend,
    find_extras,
    full,
    in_step,
    largest,
    lose_extras,
    no_dummy_image,
    play,
    set_processor,
)
from actor_ranks import RankError

from darts.messages import SequenceKey
from darts.overlap.images import make_extras

FLOAT32 = 1e-4  # nats
VISIBLE = 0.05  # nats, 500 times what is allowed
MODELS = list(vision.MODELS)


@functools.cache
def maker(model: str) -> vision.Maker:
    return vision.Maker(model)


def about(model, random, name, *, images=(), rank=0, prompt=6, response=12) -> Script:
    """A response to words and images between them."""
    words = random.integers(vision.FIRST_WORD, vision.VOCABULARY, prompt + response).tolist()
    begin = [*words[:2], *(token for image in images for token in vision.span(image)), *words[2:prompt]]
    tokens = np.array(begin + words[prompt:], dtype=np.int32)
    extras = make_extras(maker(model), maker(model).output(tokens, len(begin), list(images)))
    return Script(SequenceKey(name, rank), tokens, len(begin), rank, images=list(images), extras=extras)


def mixed(model, size, seed=1) -> list[Script]:
    """Siblings of one image, two images, and text; of two ranks the last has text alone."""
    random = np.random.default_rng(seed)
    one, other, wide = (vision.picture(random, *sizes) for sizes in ((2, 3), (3, 2), (2, 5)))
    return [
        about(model, random, "sibling", images=[one]),
        about(model, random, "sibling too", images=[one], response=21),
        about(model, random, "two images", images=[other, wide], response=9),
        about(model, random, "text", response=15, rank=size - 1),
        about(model, random, "more text", prompt=3, response=30, rank=size - 1),
    ]


@pytest.mark.parametrize(
    ("model", "strategy"),
    [*((model, "fsdp2") for model in MODELS), pytest.param("qwen2_5_vl", "fsdp", marks=pytest.mark.slow)],
)
def test_equals_full_forward(group, model, strategy, record_property):
    group.build(model, strategy=strategy)
    scripts = mixed(model, group.size)
    settings = in_step(1, mode="sequence")
    expected = full(group, scripts, settings)
    seen = max(largest(play(group, scripts, settings, seed), expected) for seed in (0, 1, 2))
    record_property("largest", seen)
    assert seen <= FLOAT32


@pytest.mark.parametrize("model", MODELS)
def test_a_rank_without_rows_keeps_company(two_ranks, model):
    """One response in each call: the other rank has nothing, be it text or an image that is asked for."""
    two_ranks.build(model)
    scripts = mixed(model, 2)
    settings = in_step(1, mode="sequence")
    two_ranks.all("call", "overlap_open", settings)
    for number, one in enumerate(scripts):
        calls = calls_of([one], 2)[0]
        extend(two_ranks, [replace(call, number=number) for call in calls])
    assert largest(collect(two_ranks, 1, [one.key for one in scripts]), full(two_ranks, scripts, settings)) <= FLOAT32


@pytest.mark.parametrize("model", MODELS)
def test_text_alone(group, model):
    """A vision model that is trained on text."""
    group.build(model)
    scripts = [one for one in mixed(model, group.size) if not one.images]
    settings = in_step(1, mode="sequence")
    assert largest(play(group, scripts, settings), full(group, scripts, settings)) <= FLOAT32


@pytest.mark.parametrize("settings", [{"with_reference": True}, {"lora_rank": 4}], ids=["reference", "LoRA"])
def test_reference(group, settings):
    group.build("qwen2_5_vl", **settings)
    scripts = mixed("qwen2_5_vl", group.size)
    step = in_step(1, mode="sequence", with_reference=True)
    found = play(group, scripts, step)
    assert largest(found, full(group, scripts, step)) <= FLOAT32
    apart = [np.abs(values["old_log_probs"] - values["ref_log_prob"]).max() for values in found.values()]
    assert max(apart) > 0.1, "actor and reference are the same model: the comparison says nothing"


def test_nothing_grows_and_no_cache_is_made(group):
    """Mode `token` is refused before any forward; complete responses go on."""
    group.build("qwen2_5_vl")
    for ability in group.all("call", "overlap_open", SETTINGS):
        assert ability.refusal == "Qwen2_5_VLConfig is multimodal"
        assert ability.bytes_per_token == 0
    scripts = mixed("qwen2_5_vl", group.size)
    for calls in calls_of(scripts, group.size):
        assert {report.peak_cache_bytes for report in extend(group, calls)} == {0}
    found = collect(group, SETTINGS.step, [one.key for one in scripts])
    assert largest(found, full(group, scripts)) <= FLOAT32


def test_a_processor_alone_is_reason_enough(one_rank):
    one_rank.build("qwen2")
    one_rank.all("run", set_processor)
    (ability,) = one_rank.all("call", "overlap_open", SETTINGS)
    assert "multimodal" in ability.refusal


# ---- mistakes on purpose --------------------------------------------------------------------------------------------


def _text_positions(scripts):
    for one in scripts:
        plain = np.tile(np.arange(len(one.tokens)), (4, 1))
        one.extras = replace(one.extras, position_ids=plain)


def _images_swapped(scripts):
    first, second = scripts[:2]
    first.extras, second.extras = (
        replace(ours.extras, multi_modal_inputs=theirs.extras.multi_modal_inputs)
        for ours, theirs in ((first, second), (second, first))
    )


def _image_lost(scripts):
    """The sizes of the image stay, and its pixels are those of nothing."""
    inputs = scripts[0].extras.multi_modal_inputs
    empty = inputs["pixel_values"] * 0
    scripts[0].extras = replace(scripts[0].extras, multi_modal_inputs=inputs | {"pixel_values": empty})


@pytest.mark.parametrize("mistake", [_text_positions, _images_swapped, _image_lost])
@pytest.mark.parametrize("model", MODELS)
def test_comparison_sees(one_rank, model, mistake):
    one_rank.build(model)
    random = np.random.default_rng(2)
    scripts = [
        about(model, random, name, images=[vision.picture(random, 2, 3)], response=response)
        for name, response in (("a", 20), ("b", 23))
    ]
    settings = in_step(1, mode="sequence")
    expected = full(one_rank, scripts, settings)
    assert largest(play(one_rank, scripts, settings), expected) <= FLOAT32
    mistake(scripts)
    assert largest(play(one_rank, scripts, in_step(2, mode="sequence")), expected) > VISIBLE


def test_extras_that_do_not_fit_are_refused_on_all_ranks(group):
    group.build("qwen2_5_vl")
    settings = in_step(1, mode="sequence")
    group.all("call", "overlap_open", settings)
    script = mixed("qwen2_5_vl", group.size)[0]
    right = script.extras
    for wrong, why in [
        (right.position_ids[:, 1:], "positions (4, 25) of 26 tokens"),
        (right.position_ids[0], "positions (26,) of 26 tokens"),
    ]:
        script.extras = replace(right, position_ids=wrong)
        with pytest.raises(RankError) as refused:
            extend(group, calls_of([script], group.size)[0])
        assert why in str(refused.value)
        assert str(refused.value).count("RuntimeError: ") == 2 * group.size
    script.extras = right
    last = group.size - 1
    group.all("run", lose_extras, last)
    try:
        with pytest.raises(RankError, match="the extras of a row are gone") as refused:
            extend(group, calls_of([replace(script, rank=last)], group.size)[0])
    finally:
        group.all("run", find_extras, last)
    assert str(refused.value).count("RuntimeError: ") == 2 * group.size
    extend(group, calls_of([script], group.size)[0])
    assert collect(group, 1, [script.key]).keys() == {script.key}


def test_images_are_left_to_verl_where_text_does_not_run_the_vision_tower(group):
    """Ranks with images and ranks without would wait for different things."""
    group.build("qwen3_vl")
    scripts = mixed("qwen3_vl", group.size)
    settings = in_step(1, mode="sequence")
    expected = full(group, scripts, settings)
    group.all("run", no_dummy_image)
    try:
        found = play(group, scripts, settings)
    finally:
        group.all("run", dummy_image_again)
    left = {one.key for one in scripts if one.images and group.size > 1}
    assert found.keys() == expected.keys() - left
    assert largest(found, {key: expected[key] for key in found}) <= FLOAT32
