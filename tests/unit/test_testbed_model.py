"""The testbeds' tokenizer, model, packing and sampler (torch on CPU, no training)."""

import random
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

from darts.testbed import LIMITS, assets_dir
from darts.testbed.measure import sample
from darts.testbed.model import END, PAD, build_model, build_tokenizer, prompt_tokens
from darts.testbed.task import MIXES, Problem, demonstrate, draw_problem
from darts.testbed.warmstart import BY_SEGMENTS, Schedule, examples, loss_of, packed, segment_bounds, train

TESTBEDS = sorted(LIMITS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    return build_model(tokenizer, seed=0).eval()


@pytest.fixture(scope="module", params=TESTBEDS)
def committed(request) -> tuple[str, Qwen2Tokenizer]:
    return request.param, AutoTokenizer.from_pretrained(assets_dir(request.param) / "model")


def test_every_byte_is_one_token_and_text_round_trips(tokenizer: Qwen2Tokenizer):
    for text in ("37+8=45\nwait, 45\n#45.", " spaces  and\ttabs\n\n", "é ß 漢 🙂"):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode())
        assert max(ids) < 256
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 259


def test_newline_is_one_token_and_verl_accepts_the_tokenizer(tokenizer: Qwen2Tokenizer):
    assert len(tokenizer.encode("\n", add_special_tokens=False)) == 1
    continuous = pytest.importorskip("verl.utils.tokenizer.continuous_token")
    builder = continuous.QwenContinuousTokenBuilder(tokenizer)
    message = [{"role": "user", "content": "37+8"}]
    assert builder.build_initial_tokens(message) == prompt_tokens(tokenizer, "37+8")


def test_prompt_is_chatml_without_a_system_message(tokenizer: Qwen2Tokenizer):
    rendered = tokenizer.decode(prompt_tokens(tokenizer, "37+8"))
    assert rendered == "<|im_start|>user\n37+8<|im_end|>\n<|im_start|>assistant\n"


def test_same_seed_same_weights(tokenizer: Qwen2Tokenizer, model: Qwen2ForCausalLM):
    again, other = build_model(tokenizer, seed=0), build_model(tokenizer, seed=1)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert model.num_parameters() < 1_000_000


@pytest.mark.parametrize("testbed", TESTBEDS)
def test_prompts_of_every_class_fit_their_limit(testbed: str, tokenizer: Qwen2Tokenizer):
    mix = MIXES[testbed]
    longest = Problem(numbers=(mix.first[1], *[9] * (max(mix.classes) - 1)))
    assert len(prompt_tokens(tokenizer, longest.question)) <= LIMITS[testbed].prompt


def test_examples_are_cut_at_the_limit_without_an_end_token(tokenizer: Qwen2Tokenizer):
    stream = examples(tokenizer, MIXES["overthink"], LIMITS["overthink"], 0, frozenset())
    for _ in range(300):
        ids, prompt = next(stream)
        assert len(ids) - prompt <= 256
        assert (ids[-1] == tokenizer.eos_token_id) == (tokenizer.eos_token_id in ids[prompt:])
        if ids[-1] != tokenizer.eos_token_id:
            assert len(ids) - prompt == 256


def test_examples_are_never_of_excluded_problems(tokenizer: Qwen2Tokenizer):
    mix = MIXES["overthink"]
    rng = random.Random(0)
    kept = draw_problem(rng, 2, mix.first)
    first = range(mix.first[0], mix.first[1] + 1)
    excluded = frozenset(Problem(numbers=(a, b)) for a in first for b in range(1, 10)) - {kept}
    stream = examples(tokenizer, mix, LIMITS["overthink"], 0, excluded)
    prompts = [tokenizer.decode(ids[:prompt]) for ids, prompt in (next(stream) for _ in range(300))]
    of_two = {text for text in prompts if text.count("+") == 1}
    assert of_two <= {tokenizer.decode(prompt_tokens(tokenizer, kept.question))}


def test_packing_changes_no_loss(tokenizer: Qwen2Tokenizer, model: Qwen2ForCausalLM):
    """The mean over one packed row equals the token-weighted mean over its examples alone."""
    mix, rng = MIXES["depth"], random.Random(0)
    problems = [draw_problem(rng, difficulty, mix.first) for difficulty in (3, 5)]
    pairs = []
    for problem in problems:
        prompt = prompt_tokens(tokenizer, problem.question)
        pairs.append(([*prompt, *tokenizer.encode(demonstrate(rng, problem, mix))], len(prompt)))
    filler = ([0] * 200, 1)
    together = next(packed(iter([*pairs, filler]), 1, 190, tokenizer.pad_token_id))
    assert together.segments.max() == 1
    total, count = 0.0, 0
    for pair in pairs:
        alone = next(packed(iter([pair, filler]), 1, len(pair[0]), tokenizer.pad_token_id))
        answers = len(pair[0]) - pair[1]
        total, count = total + loss_of(model, alone).item() * answers, count + answers
    assert loss_of(model, together).item() == pytest.approx(total / count, abs=1e-5)


def test_attention_by_segments_changes_no_loss_and_no_gradient(tokenizer: Qwen2Tokenizer):
    stream = examples(tokenizer, MIXES["overthink"], LIMITS["overthink"], 0, frozenset())
    batch = next(packed(stream, 2, 400, tokenizer.pad_token_id))
    assert batch.segments.max() > 1
    results = []
    for implementation in ("sdpa", BY_SEGMENTS):
        trained = build_model(tokenizer, seed=0)
        trained.set_attn_implementation(implementation)
        loss = loss_of(trained, batch)
        loss.backward()
        results.append((loss.item(), trained.model.layers[0].self_attn.q_proj.weight.grad))
    (masked, masked_gradient), (segmented, segmented_gradient) = results
    assert segmented == pytest.approx(masked, abs=1e-5)
    assert torch.allclose(segmented_gradient, masked_gradient, atol=1e-6)


def test_bounds_of_segments_by_hand():
    segments = torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0]])
    assert segment_bounds(segments) == [(0, 0, 2), (0, 2, 3), (1, 0, 4)]


def test_training_is_deterministic_and_lowers_the_loss(tokenizer: Qwen2Tokenizer):
    def run() -> tuple[Qwen2ForCausalLM, list[str]]:
        lines: list[str] = []
        trained = build_model(tokenizer, seed=0)
        stream = examples(tokenizer, MIXES["depth"], LIMITS["depth"], 0, frozenset())
        batches = packed(stream, 1, 176, tokenizer.pad_token_id)
        train(trained, batches, Schedule(steps=4, rows=1, warmup=1), report=lines.append)
        return trained, lines

    (first, lines), (second, _) = run(), run()
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert "step 4/4" in lines[-1]
    assert float(lines[-1].split()[3]) < 5.55


def test_sampler_respects_limit_and_order(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer):
    prompts = [prompt_tokens(tokenizer, question) for question in ("37+8", "10+1", "20+5")]
    runs = [sample(model, prompts, 5, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert all(1 <= len(response) <= 5 for response in runs[0])
    with pytest.raises(ValueError, match="must be equal"):
        sample(model, [[1, 2], [1]], 5, torch.Generator())


@pytest.mark.parametrize("compact_below", [0.0, 1.0])
def test_sampler_keeps_the_context_of_rows_when_others_finish(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, monkeypatch: pytest.MonkeyPatch, compact_below: float
):
    """With the likeliest token always drawn, each row equals a run of that row alone."""
    monkeypatch.setattr("darts.testbed.measure._COMPACT_BELOW", compact_below)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    prompts = [prompt_tokens(tokenizer, question) for question in ("37+8", "10+1", "20+5")]
    alone = [sample(model, [prompt], 6, torch.Generator())[0] for prompt in prompts]
    monkeypatch.setattr(model.generation_config, "eos_token_id", alone[0][2])
    together = sample(model, prompts, 6, torch.Generator())
    for whole, cut in zip(alone, together, strict=True):
        end = whole.index(alone[0][2]) + 1 if alone[0][2] in whole else 6
        assert cut == whole[:end]


def test_committed_tokenizer_is_the_one_that_is_built(committed, tokenizer: Qwen2Tokenizer):
    _, loaded = committed
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.pad_token) == (END, PAD)
    assert prompt_tokens(loaded, "37+8") == prompt_tokens(tokenizer, "37+8")


def test_committed_model_loads_and_stops_at_im_end(committed):
    name, loaded = committed
    trained = AutoModelForCausalLM.from_pretrained(assets_dir(name) / "model")
    assert trained.config.model_type == "qwen2"
    assert trained.dtype == torch.float32
    assert trained.generation_config.eos_token_id == loaded.eos_token_id
    heads = trained.config.hidden_size // trained.config.num_attention_heads
    assert heads == 32
