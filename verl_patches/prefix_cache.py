"""Keys and values of sequences that are not finished, and the batch of a forward that continues them.

Contract:
1. A `Prefix` belongs to one sequence and one model. It holds what the model gave its cache, bit for bit, for the tokens
   forwarded so far, and grows without copying the whole prefix each time (chunks merge like a binary counter).
2. A `PrefixBatch` is one forward: row `b` continues `prefixes[b]` (P_b tokens, may be 0) by n_b >= 1 new tokens.
   Prefixes are padded on the left to P, new tokens on the right to n, so that key distances are right for sliding
   windows: keys of row b lie at columns [P - P_b, P + n_b), the attention mask is 0 elsewhere, positions are P_b,
   P_b + 1, ...
3. Padding is finite (zeros) and has no position that the row itself does not have.
4. Memory is exact: a batch takes `rows * (P + n) * bytes_per_token`, and the model writes into it in place. Merging a
   prefix's chunks takes no more than the prefix besides it, so after `release` less than the batch did.
5. What does not fit the geometry learnt from the model itself raises `CannotContinue`: never cast, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class CannotContinue(RuntimeError):
    """The model's cache is not one that these prefixes can stand for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Sizes of the keys and values that a model caches for a token; all its layers are alike."""

    layers: int
    heads: int
    key_dim: int
    value_dim: int
    key_dtype: torch.dtype
    value_dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        keys, values = self.key_dim * self.key_dtype.itemsize, self.value_dim * self.value_dtype.itemsize
        return self.layers * self.heads * (keys + values)

    @classmethod
    def of(cls, cache: DynamicCache, layers: int, tokens: int) -> Geometry:
        """Learnt from the cache of a batch without a geometry that the model has run, of `tokens` tokens a row.

        Raises:
            CannotContinue: the cache is not `layers` layers of equal keys and values of all tokens.
        """
        if len(cache.layers) != layers:
            raise CannotContinue(f"the model caches {len(cache.layers)} of its {layers} layers")
        found = set()
        for number, layer in enumerate(cache.layers):
            if layer.get_seq_length() != tokens:
                raise CannotContinue(f"layer {number} caches {layer.get_seq_length()} of {tokens} tokens")
            keys, values = layer.keys, layer.values  # [rows, heads, tokens, key_dim], [rows, heads, tokens, value_dim]
            if keys.ndim != 4 or keys.shape[:3] != values.shape[:3]:
                raise CannotContinue(f"layer {number} caches keys {keys.shape} and values {values.shape}")
            sizes = (keys.shape[1], keys.shape[3], values.shape[3])
            found.add((*sizes, keys.dtype, values.dtype, keys.device))
        if len(found) != 1:
            raise CannotContinue(f"layers cache keys and values of different sizes: {sorted(map(str, found))}")
        heads, key_dim, value_dim, key_dtype, value_dtype, device = found.pop()
        return cls(
            layers=layers, heads=heads, key_dim=key_dim, value_dim=value_dim,
            key_dtype=key_dtype, value_dtype=value_dtype, device=device,
        )  # fmt: skip


class Prefix:
    """Keys and values of the tokens of one sequence that a model has seen."""

    __slots__ = ("_chunks", "tokens")

    def __init__(self) -> None:
        # of consecutive tokens: keys [layers, heads, tokens, key_dim], values [layers, heads, tokens, value_dim]
        self._chunks: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.tokens = 0

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._chunks)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes keys and values, shaped as a chunk, of the next tokens; they must own their memory."""
        self._chunks.append((keys, values))
        self.tokens += keys.shape[2]

    def compact(self) -> None:
        """Merges chunks, so that there are about log2(tokens) of them and each token is copied as often at most."""
        chunks = self._chunks
        while len(chunks) > 1 and chunks[-2][0].shape[2] <= chunks[-1][0].shape[2]:
            last, before = chunks.pop(), chunks.pop()
            chunks.append((torch.cat((before[0], last[0]), dim=2), torch.cat((before[1], last[1]), dim=2)))

    def copy_to(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fills keys [layers, heads, tokens, key_dim] and values [layers, heads, tokens, value_dim]."""
        start = 0
        for chunk_keys, chunk_values in self._chunks:
            end = start + chunk_keys.shape[2]
            keys[:, :, start:end] = chunk_keys
            values[:, :, start:end] = chunk_values
            start = end


class _FirstLayer(DynamicLayer):
    """A layer of the cache that takes keys and values as they are; `DynamicLayer` gives values the type of keys."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DynamicLayer.update`, once."""
        if self.is_initialized:
            raise CannotContinue("the model fills a layer of its cache twice")
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _PaddedLayer(DynamicLayer):
    """A layer of the cache with room for the new tokens: `update` writes there instead of building a longer tensor."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, prefix: int) -> None:
        super().__init__()
        self.keys, self.values = keys, values  # [rows, heads, P + n, key_dim], [rows, heads, P + n, value_dim]
        self.dtype, self.device = keys.dtype, keys.device
        self.prefix = prefix
        self.filled = False
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DynamicLayer.update`, once."""
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            room = old[:, :, self.prefix :]
            if self.filled or room.shape != new.shape or room.dtype != new.dtype:
                raise CannotContinue(
                    f"the model caches {tuple(new.shape)} of {new.dtype}, there is room for {tuple(room.shape)} of "
                    f"{room.dtype}{' and it was filled before' if self.filled else ''}"
                )
        self.keys[:, :, self.prefix :] = key_states
        self.values[:, :, self.prefix :] = value_states
        self.filled = True
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens that are cached."""
        return self.keys.shape[2] if self.filled else self.prefix


class PrefixBatch:
    """One forward that continues prefixes; see invariant 2 of the module. Without a geometry: of new sequences only,
    and the geometry can be learnt from its cache."""

    def __init__(
        self,
        geometry: Geometry | None,
        prefixes: Sequence[Prefix],
        inputs: Sequence[np.ndarray],
        labels: Sequence[np.ndarray],
        device: torch.device | str | int,
    ) -> None:
        self.prefixes = prefixes
        self.lengths = np.array([len(row) for row in inputs])  # [rows], n_b
        self.prefix = max(prefix.tokens for prefix in prefixes)  # P
        rows, new = len(inputs), int(self.lengths.max())  # n
        before = np.array([prefix.tokens for prefix in prefixes])  # [rows], P_b

        column = np.arange(new)[None]  # [1, n]
        padded = np.zeros((rows, new), dtype=np.int64)
        padded[column < self.lengths[:, None]] = np.concatenate(inputs)
        position = before[:, None] + np.minimum(column, self.lengths[:, None] - 1)
        column = np.arange(self.prefix + new)[None]  # [1, P + n]
        seen = (column >= self.prefix - before[:, None]) & (column < self.prefix + self.lengths[:, None])
        self.input_ids = torch.from_numpy(padded).to(device)  # [rows, n]
        self.position_ids = torch.from_numpy(position.astype(np.int64)).to(device)  # [rows, n]
        self.attention_mask = torch.from_numpy(seen.astype(np.int64)).to(device)  # [rows, P + n]
        self.labels = torch.from_numpy(np.concatenate(labels).astype(np.int64)).to(device)  # [sum of n_b]

        self.cache = DynamicCache()
        if geometry is None:
            if self.prefix:
                raise ValueError("a prefix cannot be continued without the geometry of its model")
            self.cache.layer_class_to_replicate = _FirstLayer
            return
        shape = (geometry.layers, rows, geometry.heads, self.prefix + new)
        self._keys = torch.zeros(*shape, geometry.key_dim, dtype=geometry.key_dtype, device=geometry.device)
        self._values = torch.zeros(*shape, geometry.value_dim, dtype=geometry.value_dtype, device=geometry.device)
        for row, prefix in enumerate(prefixes):
            where = slice(self.prefix - prefix.tokens, self.prefix)
            prefix.copy_to(self._keys[:, row, :, where], self._values[:, row, :, where])
        self.cache.layers = [
            _PaddedLayer(keys, values, self.prefix) for keys, values in zip(self._keys, self._values, strict=True)
        ]
        self.cache.layer_class_to_replicate = None  # a layer more is an error, not a new layer

    @property
    def nbytes(self) -> int:
        """Of the padded keys and values."""
        return self._keys.nbytes + self._values.nbytes

    def split(self, values: torch.Tensor | np.ndarray) -> list[Any]:
        """What belongs to each row of `[..., sum of n_b]`."""
        ends = np.cumsum(self.lengths)
        return [values[..., end - length : end] for end, length in zip(ends, self.lengths, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Appends the new keys and values to the prefixes of these rows.

        Raises:
            CannotContinue: the model has left a layer out.
        """
        missing = [number for number, layer in enumerate(self.cache.layers) if not layer.filled]
        if missing:
            raise CannotContinue(f"the model has cached nothing in the layers {missing}")
        for row in rows:
            where = slice(self.prefix, self.prefix + int(self.lengths[row]))
            keys, values = self._keys[:, row, :, where], self._values[:, row, :, where]
            own = torch.contiguous_format
            self.prefixes[row].append(keys.clone(memory_format=own), values.clone(memory_format=own))

    def release(self) -> None:
        """Gives the padded keys and values back."""
        self.cache.layers = []
        self._keys = self._values = torch.empty(0)
