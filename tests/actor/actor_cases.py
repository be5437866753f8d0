"""Random steps of the overlapped actor on real ranks, compared with full forwards; and mistakes on purpose."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import numpy as np
from actor_ranks import VOCABULARY

from darts.messages import Extras, RankCall, RankReport, Row, SequenceKey, StepSettings

SETTINGS = StepSettings(step=1, mode="token", temperature=0.7, sum_pi_squared=True)


@dataclass
class Script:
    """A sequence and how it comes: in pieces (the last may be empty), as a whole, or dropped after some pieces."""

    key: SequenceKey
    tokens: np.ndarray
    prompt: int
    rank: int
    pieces: list[int] = field(default_factory=list)
    dropped_after: int | None = None
    images: list | None = None  # None: the model has no processor
    extras: Extras | None = None

    @property
    def whole(self) -> bool:
        return not self.pieces

    def row(self, number: int) -> Row:
        """The row of piece `number`."""
        pieces = self.pieces or [len(self.tokens)]
        start = sum(pieces[:number])
        return Row(
            key=self.key, prompt_tokens=self.prompt, start=start, last=number == len(pieces) - 1,
            token_ids=self.tokens[start : start + pieces[number]], extras=self.extras,
        )  # fmt: skip


def script(random, name, *, rank=0, prompt=None, response=None, pieces=(), dropped_after=None) -> Script:
    prompt = int(random.integers(1, 12)) if prompt is None else prompt
    response = int(random.integers(1, 40)) if response is None else response
    tokens = random.integers(0, VOCABULARY, prompt + response).astype(np.int32)
    return Script(SequenceKey(name, rank), tokens, prompt, rank, list(pieces), dropped_after)


def random_scripts(seed: int, size: int) -> list[Script]:
    """A mix for `size` ranks: also fewer sequences than ranks, single tokens, empty ends, wholes and drops."""
    random = np.random.default_rng(seed)
    scripts = []
    for number in range(random.integers(1, 8)):
        one = script(random, f"s{number}", rank=int(random.integers(size)))
        if random.random() > 0.25:
            longest = int(random.choice([1, 4, 15, 60]))
            first = min(len(one.tokens), one.prompt + int(random.integers(0, longest)))
            one.pieces = [first]
            while (left := len(one.tokens) - sum(one.pieces)) > 0:
                one.pieces.append(min(left, int(random.integers(1, longest + 1))))
            if random.random() < 0.3:
                one.pieces.append(0)
            if len(one.pieces) > 1 and random.random() < 0.2:
                one.dropped_after = int(random.integers(1, len(one.pieces)))
        scripts.append(one)
    return scripts


def calls_of(scripts: list[Script], size: int, step: int = 1, seed: int = 0) -> list[list[RankCall]]:
    """Calls for all ranks; in each of them some of the sequences go on."""
    random = np.random.default_rng(seed)
    at = dict.fromkeys(range(len(scripts)), 0)
    calls = []
    while at:
        now = [number for number in at if random.random() < 0.6] or list(at)[:1]
        row = {
            "whole": [[] for _ in range(size)],
            "growing": [[] for _ in range(size)],
            "drop": [[] for _ in range(size)],
        }
        for number in now:
            one = scripts[number]
            if one.dropped_after == at[number]:
                row["drop"][one.rank].append(one.key)
                del at[number]
                continue
            row["whole" if one.whole else "growing"][one.rank].append(one.row(at[number]))
            at[number] += 1
            if at[number] == max(1, len(one.pieces)):
                del at[number]
        calls.append(
            [
                RankCall(
                    step=step, number=len(calls), whole=row["whole"][rank], growing=row["growing"][rank],
                    drop=row["drop"][rank],
                )
                for rank in range(size)
            ]
        )  # fmt: skip
    return calls


def extend(group, calls: list[RankCall]) -> list[RankReport]:
    return group.each("call", [("overlap_extend", call) for call in calls])


def collect(group, step: int, keys: list[SequenceKey]) -> dict:
    """What all ranks have of all keys."""
    answers = group.all("call", "overlap_collect", step, keys)
    found = [key for answer in answers for key in answer.values]
    assert len(set(found)) == len(found), "two ranks have the same sequence"
    return {key: values for answer in answers for key, values in answer.values.items()}


def play(group, scripts: list[Script], settings: StepSettings = SETTINGS, seed: int = 0) -> dict:
    """One step; the results of all sequences that were finished."""
    abilities = group.all("call", "overlap_open", settings)
    assert {ability.refusal for ability in abilities} == {None}
    for calls in calls_of(scripts, group.size, settings.step, seed):
        extend(group, calls)
    return collect(group, settings.step, [one.key for one in scripts])


def full(group, scripts: list[Script], settings: StepSettings = SETTINGS, **batching) -> dict:
    """The same sequences through verl's own forward."""
    sequences = [(one.tokens, one.prompt) for one in scripts]
    if any(one.images is not None for one in scripts):
        batching["images"] = [one.images for one in scripts]
    results = group.all("full", sequences, settings.temperature, **batching)[0]
    if settings.with_reference:
        more = group.all("full", sequences, settings.temperature, reference=True, **batching)[0]
        results = [a | b for a, b in zip(results, more, strict=True)]
    return {one.key: values for one, values in zip(scripts, results, strict=True)}


def differences(found: dict, expected: dict) -> dict[str, np.ndarray]:
    """Absolute differences by name, of all tokens; both must have the same sequences, names and lengths."""
    assert found.keys() == expected.keys()
    by_name: dict[str, list[np.ndarray]] = {}
    for key, values in expected.items():
        assert found[key].keys() == values.keys()
        for name, right in values.items():
            assert found[key][name].dtype == np.float32
            assert found[key][name].shape == right.shape, (key, name)
            by_name.setdefault(name, []).append(np.abs(found[key][name] - right))
    return {name: np.concatenate(parts) for name, parts in by_name.items()}


def finished(scripts: list[Script]) -> list[Script]:
    return [one for one in scripts if one.dropped_after is None]


def num_parameters(rank) -> int:
    return sum(parameter.numel() for parameter in rank.worker.actor.engine.module.parameters())


def largest(found: dict, expected: dict) -> float:
    return max(float(values.max()) for values in differences(found, expected).values())


def in_step(step: int, **settings) -> StepSettings:
    return replace(SETTINGS, step=step, **settings)


# ---- mistakes, made in the process of a rank ----------------------------------------------------------------------


def _batch_with(change):
    """A `PrefixBatch` that `change` has spoilt."""
    from verl_patches import log_prob_model as overlap_engine

    upstream = overlap_engine.PrefixBatch

    class Spoilt(upstream):
        def __init__(self, *args):
            super().__init__(*args)
            change(self)

    overlap_engine.PrefixBatch = Spoilt
    return functools.partial(setattr, overlap_engine, "PrefixBatch", upstream)


def _positions_restart(batch):
    batch.position_ids -= batch.position_ids[:, :1].clone()


def _padding_is_seen(batch):
    batch.attention_mask.fill_(1)


def _prefix_one_to_the_left(batch):
    if batch.prefix:
        batch._keys[..., : batch.prefix, :] = batch._keys[..., : batch.prefix, :].roll(-1, dims=-2)


def _boundary_token_lost():
    """The first token of a chunk is predicted from itself, as where chunks are forwarded one by one."""
    from verl_patches.dp_actor import RankSession

    upstream = RankSession._admit

    def admit(self, row):
        work = upstream(self, row)
        if row.start and len(work.inputs):
            work.inputs[0] = work.labels[0]
        return work

    RankSession._admit = admit
    return functools.partial(setattr, RankSession, "_admit", upstream)


def _labels_one_late():
    from verl_patches.dp_actor import RankSession

    upstream = RankSession._admit

    def admit(self, row):
        work = upstream(self, row)
        work.labels[:] = np.roll(work.labels, 1)
        return work

    RankSession._admit = admit
    return functools.partial(setattr, RankSession, "_admit", upstream)


def _error_in_layer():
    from verl_patches.prefix_cache import _PaddedLayer

    upstream = _PaddedLayer.update

    def update(self, *args, **kwargs):
        raise RuntimeError("this layer takes no keys")

    _PaddedLayer.update = update
    return functools.partial(setattr, _PaddedLayer, "update", upstream)


def _cache_is_ignored():
    from verl_patches.log_prob_model import OverlapEngine

    upstream = OverlapEngine.prepare_model_inputs

    def prepare_model_inputs(self, micro_batch):
        inputs, outputs = upstream(self, micro_batch)
        inputs.pop("past_key_values", None)
        if inputs["attention_mask"].shape[1] > inputs["input_ids"].shape[1]:
            inputs["attention_mask"] = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :]
        return inputs, outputs

    OverlapEngine.prepare_model_inputs = prepare_model_inputs
    return functools.partial(setattr, OverlapEngine, "prepare_model_inputs", upstream)


OF_THE_BATCH = {
    "positions restart": functools.partial(_batch_with, _positions_restart),
    "padding is seen": functools.partial(_batch_with, _padding_is_seen),
    "prefix one to the left": functools.partial(_batch_with, _prefix_one_to_the_left),
    "an error in a layer": _error_in_layer,
    "the cache is ignored": _cache_is_ignored,
}
OF_THE_TOKENS = {"boundary token lost": _boundary_token_lost, "labels one late": _labels_one_late}
_undo = []


def spoil(rank, mistake: str) -> None:
    _undo.append((OF_THE_BATCH | OF_THE_TOKENS)[mistake]())


def repair(rank) -> None:
    while _undo:
        _undo.pop()()


def scale_weights(rank, factor: float) -> None:
    """As a training step would, the weights move."""
    for parameter in rank.worker.actor.engine.module.parameters():
        parameter.data.mul_(factor)


def forget_check(rank) -> None:
    """As in a new process: the model is checked at the next open."""
    rank.worker._overlap = None


def set_config(rank, name: str, value) -> None:
    setattr(rank.worker.actor.engine.module.config, name, value)


def set_engine(rank, name: str, value) -> None:
    setattr(rank.worker.actor.engine, name, value)


def set_processor(rank) -> None:
    rank.worker.actor.engine.model_config.processor = object()


def lose_extras(rank, of: int) -> None:
    """On one rank, as where the worker that put them has died."""
    from ray.exceptions import RayError

    from verl_patches import row_extras as overlap_extras

    def fetch(extras):
        raise RayError("it is gone")

    if rank.rank == of:
        rank.fetch, overlap_extras.fetch = overlap_extras.fetch, fetch


def find_extras(rank, of: int) -> None:
    from verl_patches import row_extras as overlap_extras

    if rank.rank == of:
        overlap_extras.fetch = rank.fetch


def no_dummy_image(rank) -> None:
    """As a model that verl has not patched."""
    from verl.models.transformers import qwen3_vl

    upstream = rank.upstream = qwen3_vl._get_input_embeds

    def without(model, input_ids, attention_mask=None, pixel_values=None, *others):
        if pixel_values is not None:
            return upstream(model, input_ids, attention_mask, pixel_values, *others)
        return {
            "inputs_embeds": model.get_input_embeddings()(input_ids), "attention_mask": attention_mask,
            "visual_pos_masks": None, "deepstack_visual_embeds": None,
        }  # fmt: skip

    qwen3_vl._get_input_embeds = without


def dummy_image_again(rank) -> None:
    from verl.models.transformers import qwen3_vl

    qwen3_vl._get_input_embeds = rank.upstream


def watch_forwards(rank) -> None:
    """Remembers the shapes of what the actor forwards, until `forwards`."""
    engine = rank.worker.actor.engine
    upstream, rank.shapes = engine.prepare_model_inputs, []

    def prepare_model_inputs(micro_batch):
        inputs, outputs = upstream(micro_batch=micro_batch)
        rank.shapes.append(tuple(inputs["input_ids"].shape))
        return inputs, outputs

    engine.prepare_model_inputs = prepare_model_inputs


def forwards(rank) -> list[tuple[int, ...]]:
    del rank.worker.actor.engine.prepare_model_inputs
    return rank.shapes


def share_sequences(rank) -> None:
    """As with Ulysses: the other ranks are not of this rank's data-parallel group."""
    import torch

    groups = [torch.distributed.new_group([one]) for one in range(torch.distributed.get_world_size())]
    rank.worker.actor.engine.get_data_parallel_group = lambda: groups[rank.rank]


def share_no_sequences(rank) -> None:
    del rank.worker.actor.engine.get_data_parallel_group


def mfu(rank, promised: float) -> tuple[float, float]:
    """Of the step, on a device that promises `promised` TFLOP/s; and that of whole sequences of the same tokens."""
    from verl.utils import flops_counter

    session = rank.worker._overlap
    upstream, flops_counter.get_device_flops = flops_counter.get_device_flops, lambda: promised
    try:
        lengths = [one.known - 1 for one in session._sequences.values()]
        whole, _ = rank.worker.actor.flops_counter.estimate_flops(lengths, session._busy_s)
        return session._mfu(), whole / promised / 3
    finally:
        flops_counter.get_device_flops = upstream


def cached_tensors(rank) -> int:
    """Bytes of the keys and values that any object of the process still holds, by looking for their shape."""
    import gc

    import torch

    geometry = rank.worker._overlap._actor.geometry
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.ndim in (4, 5)]
    return sum(one.nbytes for one in tensors if one.shape[0] == geometry.layers and one.shape[-1] == geometry.key_dim)


# ---- training ------------------------------------------------------------------------------------------------------


def train(rank, seed: int, prompt: int = 4, response: int = 12, rows: int = 4) -> None:
    """One step on this rank's part of a random batch, with verl's own loss, as `RayPPOTrainer._update_actor` asks for
    it. Something is drawn from the process's own generator, as dropout would."""
    import torch
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    world = torch.distributed.get_world_size()
    random = torch.Generator().manual_seed(1000 * seed + rank.rank)
    shape = rows, prompt + response
    ids, mask = torch.randint(0, 256, shape, generator=random), torch.ones(shape, dtype=torch.int64)
    data = TensorDict(
        {
            "prompts": ids[:, :prompt], "responses": ids[:, prompt:], "input_ids": ids, "attention_mask": mask,
            "position_ids": mask.cumsum(1) - 1, "response_mask": mask[:, prompt:],
            "old_log_probs": -5 - torch.rand(rows, response, generator=random),
            "advantages": torch.randn(rows, response, generator=random) + 0.1 * torch.randn(rows, response),
        },
        batch_size=[rows],
    )  # fmt: skip
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(
        data, calculate_entropy=False, temperature=1.0, global_batch_size=rows * world, epochs=1, seed=seed,
        mini_batch_size=rows * world // 2, dataloader_kwargs={"shuffle": True}, compute_loss=True,
    )  # fmt: skip
    rank.worker.update_actor(data)


def actor_state(rank) -> dict:
    """What training has made of this rank's part of the actor, by name; no two names of equal meaning."""
    import torch

    engine = rank.worker.actor.engine
    found = {}
    for number, parameter in enumerate(engine.module.parameters()):
        found[f"weight {number}"] = parameter
        state = engine.optimizer.state.get(parameter) or {"exp_avg": None, "exp_avg_sq": None, "step": None}
        found |= {f"{name} {number}": value for name, value in state.items()}
    scheduler = engine.lr_scheduler.state_dict()
    found |= {f"lr {number}": group["lr"] for number, group in enumerate(engine.optimizer.param_groups)}
    found |= {f"schedule {name}": scheduler[name] for name in ("last_epoch", "_last_lr", "_step_count")}
    found["random"] = torch.get_rng_state()
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            value = value.detach()
            found[name] = getattr(value, "_local_tensor", value).cpu().numpy().copy()
    return found


def seed_process(rank, seed: int) -> None:
    import torch

    torch.manual_seed(seed)
