"""Prefixes and the batches that continue them, without a model."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from verl_patches.prefix_cache import CannotContinue, Geometry, Prefix, PrefixBatch

SIZES = {"layers": 2, "heads": 3, "key_dim": 4, "value_dim": 5}
GEOMETRY = Geometry(**SIZES, key_dtype=torch.float32, value_dtype=torch.bfloat16, device=torch.device("cpu"))


def states(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A chunk's keys [layers, heads, tokens, key_dim] and values [layers, heads, tokens, value_dim]."""
    return torch.randn(2, 3, tokens, 4), torch.randn(2, 3, tokens, 5).bfloat16()


@settings(max_examples=50)
@given(st.lists(st.integers(1, 9), max_size=40))
def test_prefix_holds_its_tokens_in_few_chunks(lengths):
    prefix, all_states = Prefix(), [states(length) for length in lengths]
    for keys, values in all_states:
        prefix.append(keys, values)
        prefix.compact()
    total = sum(lengths)
    assert prefix.tokens == total
    assert prefix.nbytes == total * GEOMETRY.bytes_per_token
    assert len(prefix._chunks) <= 1 + np.log2(max(1, total))
    keys, values = torch.zeros(2, 3, total, 4), torch.zeros(2, 3, total, 5).bfloat16()
    prefix.copy_to(keys, values)
    if lengths:
        assert torch.equal(keys, torch.cat([keys for keys, _ in all_states], dim=2))
        assert torch.equal(values, torch.cat([values for _, values in all_states], dim=2))


class LiveBytes(TorchDispatchMode):
    """Bytes of all numbers with a fraction that were made inside and live, and the most of them at once."""

    def __init__(self):
        super().__init__()
        self._storages = {}
        self.most = 0

    def now(self):
        self._storages = {at: one for at, one in self._storages.items() if not one[0].expired()}
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, self.now())
        return made


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=12))
def test_merging_chunks_needs_less_than_the_batch_that_was_released(calls):
    """The peak of prefixes and batch is the peak of all: what merging holds twice comes when the batch is gone."""
    prefixes = [Prefix() for _ in range(3)]
    with LiveBytes() as live:
        for lengths in calls:
            inputs = [np.zeros(length, dtype=np.int64) for length in lengths]
            batch = PrefixBatch(GEOMETRY, prefixes, inputs, inputs, "cpu")
            for layer in range(GEOMETRY.layers):
                shape = (3, GEOMETRY.heads, max(lengths))
                keys = torch.zeros(*shape, GEOMETRY.key_dim)
                batch.cache.update(keys, torch.zeros(*shape, GEOMETRY.value_dim).bfloat16(), layer)
                del keys
            batch.keep(range(3))
            allowed = sum(prefix.nbytes for prefix in prefixes) + batch.nbytes
            batch.release()
            live.most = 0
            for prefix in prefixes:
                prefix.compact()
            assert live.most <= allowed
            assert live.now() == sum(prefix.nbytes for prefix in prefixes)


def test_batch_pads_prefixes_left_and_new_tokens_right():
    prefixes = [Prefix(), Prefix()]
    keys, values = states(3)
    prefixes[0].append(keys, values)
    batch = PrefixBatch(GEOMETRY, prefixes, [np.array([7]), np.array([8, 9])], [np.array([1]), np.array([2, 3])], "cpu")
    assert batch.input_ids.tolist() == [[7, 0], [8, 9]]
    assert batch.position_ids.tolist() == [[3, 3], [0, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert batch.labels.tolist() == [1, 2, 3]
    assert batch.nbytes == 2 * 5 * GEOMETRY.bytes_per_token
    assert batch.cache.get_seq_length() == 3
    assert batch.cache.get_mask_sizes(2, 0) == (5, 0)
    new_keys, new_values = torch.randn(2, 2, 3, 2, 4), torch.randn(2, 2, 3, 2, 5).bfloat16()  # [layers, rows, ...]
    with pytest.raises(CannotContinue, match=r"cached nothing in the layers \[0, 1\]"):
        batch.keep([0])
    for layer in range(2):
        all_keys, _ = batch.cache.update(new_keys[layer], new_values[layer], layer)
        assert torch.equal(all_keys[0, :, :3], keys[layer])
        assert not all_keys[1, :, :3].any()
    batch.keep([1])
    assert [prefix.tokens for prefix in prefixes] == [3, 2]
    assert torch.equal(prefixes[1]._chunks[0][0], new_keys[:, 1])
    assert torch.equal(prefixes[1]._chunks[0][1], new_values[:, 1])


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (torch.zeros(1, 3, 2, 4).double(), torch.zeros(1, 3, 2, 5).bfloat16()),
        (torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 5).bfloat16()),
    ],
    ids=["dtype", "tokens"],
)
def test_layer_casts_nothing(keys, values):
    batch = PrefixBatch(GEOMETRY, [Prefix()], [np.array([7, 8])], [np.array([8, 9])], "cpu")
    with pytest.raises(CannotContinue, match="there is room for"):
        batch.cache.update(keys, values, 0)


def test_geometry_is_learnt_from_layers_that_are_alike():
    cache = PrefixBatch(None, [Prefix()], [np.arange(6)], [np.arange(6)], "cpu").cache
    cache.update(torch.zeros(1, 3, 6, 4), torch.zeros(1, 3, 6, 5).bfloat16(), 0)
    with pytest.raises(CannotContinue, match="caches 1 of its 2 layers"):
        Geometry.of(cache, 2, 6)
    cache.update(torch.zeros(1, 3, 6, 4), torch.zeros(1, 3, 6, 5).bfloat16(), 1)
    assert Geometry.of(cache, 2, 6) == GEOMETRY
    with pytest.raises(CannotContinue, match="caches 6 of 7 tokens"):
        Geometry.of(cache, 2, 7)
    with pytest.raises(CannotContinue, match="twice"):
        cache.update(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 5).bfloat16(), 1)
    cache.layers[1].keys = torch.zeros(1, 3, 6, 8)
    with pytest.raises(CannotContinue, match="different sizes"):
        Geometry.of(cache, 2, 6)
