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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class CannotContinue(RuntimeError):
    """The model's cache is not one that these prefixes can stand for."""


@dataclass(frozen=True, slots=True)
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
    def of(cls, cache: DynamicCache, num_layers: int, num_tokens: int) -> Geometry:
        """The geometry learnt from the cache of a batch that the model has run without one, of `num_tokens` a row.

        Raises:
            CannotContinue: the cache is not `num_layers` layers of equal keys and values of all tokens.
        """
        if len(cache.layers) != num_layers:
            raise CannotContinue(f"the model caches {len(cache.layers)} of its {num_layers} layers")
        found_sizes = set()
        for layer_number, layer in enumerate(cache.layers):
            if layer.get_seq_length() != num_tokens:
                raise CannotContinue(f"layer {layer_number} caches {layer.get_seq_length()} of {num_tokens} tokens")
            keys, values = layer.keys, layer.values  # [rows, heads, tokens, key_dim], [rows, heads, tokens, value_dim]
            if keys.ndim != 4 or keys.shape[:3] != values.shape[:3]:
                raise CannotContinue(f"layer {layer_number} caches keys {keys.shape} and values {values.shape}")
            layer_sizes = (keys.shape[1], keys.shape[3], values.shape[3])
            found_sizes.add(cls(num_layers, *layer_sizes, keys.dtype, values.dtype, keys.device))
        if len(found_sizes) != 1:
            raise CannotContinue(f"layers cache keys and values of different sizes: {sorted(map(str, found_sizes))}")
        return found_sizes.pop()


@dataclass(slots=True, eq=False)
class Prefix:
    """Keys and values of the tokens of one sequence that a model has seen."""

    # of consecutive tokens: keys [layers, heads, tokens, key_dim], values [layers, heads, tokens, value_dim]
    _chunks: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    tokens: int = 0

    @property
    def nbytes(self) -> int:
        return sum(chunk_keys.nbytes + chunk_values.nbytes for chunk_keys, chunk_values in self._chunks)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes keys and values, shaped as a chunk, of the next tokens; they must own their memory."""
        self._chunks.append((keys, values))
        self.tokens += keys.shape[2]

    def compact(self) -> None:
        """Merges chunks, so that there are about log2(tokens) of them and each token is copied as often at most."""
        chunks = self._chunks
        while len(chunks) > 1 and chunks[-2][0].shape[2] <= chunks[-1][0].shape[2]:
            last_chunk, previous_chunk = chunks.pop(), chunks.pop()
            chunks.append(tuple(torch.cat(pair, dim=2) for pair in zip(previous_chunk, last_chunk, strict=True)))

    def copy_to(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fills keys [layers, heads, tokens, key_dim] and values [layers, heads, tokens, value_dim]."""
        chunk_start = 0
        for chunk_keys, chunk_values in self._chunks:
            chunk_end = chunk_start + chunk_keys.shape[2]
            keys[:, :, chunk_start:chunk_end] = chunk_keys
            values[:, :, chunk_start:chunk_end] = chunk_values
            chunk_start = chunk_end


class _FirstLayer(DynamicLayer):
    """A layer of the cache that takes keys and values as they are; `DynamicLayer` gives values the type of keys."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Does what `DynamicLayer.update` does, once."""
        if self.is_initialized:
            raise CannotContinue("the model fills a layer of its cache twice")
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _PaddedLayer(DynamicLayer):
    """A layer of the cache with room for the new tokens: `update` writes there instead of building a longer tensor."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, prefix_tokens: int) -> None:
        super().__init__()
        self.keys, self.values = keys, values  # [rows, heads, P + n, key_dim], [rows, heads, P + n, value_dim]
        self.dtype, self.device = keys.dtype, keys.device
        self.prefix = prefix_tokens
        self.filled = False
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Does what `DynamicLayer.update` does, once."""
        for cached_states, new_states in ((self.keys, key_states), (self.values, value_states)):
            free_states = cached_states[:, :, self.prefix :]
            if self.filled or free_states.shape != new_states.shape or free_states.dtype != new_states.dtype:
                raise CannotContinue(
                    f"the model caches {tuple(new_states.shape)} of {new_states.dtype}, there is room for "
                    f"{tuple(free_states.shape)} of {free_states.dtype}"
                    f"{' and it was filled before' if self.filled else ''}"
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
        self.lengths = np.array([len(tokens) for tokens in inputs])  # [rows], n_b
        self.prefix = max(prefix.tokens for prefix in prefixes)  # P
        num_rows, num_new = len(inputs), int(self.lengths.max())  # n
        tokens_before = np.array([prefix.tokens for prefix in prefixes])  # [rows], P_b

        # 1. Tokens, positions and mask: a row's columns are its prefix, right-aligned, and its new tokens after it.
        column = np.arange(num_new)[None]  # [1, n]
        padded_ids = np.zeros((num_rows, num_new), dtype=np.int64)
        padded_ids[column < self.lengths[:, None]] = np.concatenate(inputs)
        position_numbers = tokens_before[:, None] + np.minimum(column, self.lengths[:, None] - 1)
        column = np.arange(self.prefix + num_new)[None]  # [1, P + n]
        seen_mask = (column >= self.prefix - tokens_before[:, None]) & (column < self.prefix + self.lengths[:, None])
        self.input_ids = torch.from_numpy(padded_ids).to(device)  # [rows, n]
        self.position_ids = torch.from_numpy(position_numbers.astype(np.int64)).to(device)  # [rows, n]
        self.attention_mask = torch.from_numpy(seen_mask.astype(np.int64)).to(device)  # [rows, P + n]
        self.labels = torch.from_numpy(np.concatenate(labels).astype(np.int64)).to(device)  # [sum of n_b]

        # 2. The cache: what the prefixes hold, and room for the new tokens.
        self.cache = DynamicCache()
        if geometry is None:
            if self.prefix:
                raise ValueError("a prefix cannot be continued without the geometry of its model")
            self.cache.layer_class_to_replicate = _FirstLayer
            return
        cache_shape = (geometry.layers, num_rows, geometry.heads, self.prefix + num_new)
        self._keys = torch.zeros(*cache_shape, geometry.key_dim, dtype=geometry.key_dtype, device=geometry.device)
        self._values = torch.zeros(*cache_shape, geometry.value_dim, dtype=geometry.value_dtype, device=geometry.device)
        for row_number, prefix in enumerate(prefixes):
            prefix_columns = slice(self.prefix - prefix.tokens, self.prefix)
            prefix.copy_to(self._keys[:, row_number, :, prefix_columns], self._values[:, row_number, :, prefix_columns])
        self.cache.layers = [
            _PaddedLayer(keys, values, self.prefix) for keys, values in zip(self._keys, self._values, strict=True)
        ]
        self.cache.layer_class_to_replicate = None  # a layer more is an error, not a new layer

    @property
    def nbytes(self) -> int:
        """The bytes of the padded keys and values."""
        return self._keys.nbytes + self._values.nbytes

    def split(self, values: torch.Tensor | np.ndarray) -> list[Any]:
        """What belongs to each row of `[..., sum of n_b]`."""
        row_ends = np.cumsum(self.lengths)
        return [values[..., row_end - length : row_end] for row_end, length in zip(row_ends, self.lengths, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Appends the new keys and values to the prefixes of these rows.

        Raises:
            CannotContinue: the model has left a layer out.
        """
        missing_layers = [layer_number for layer_number, layer in enumerate(self.cache.layers) if not layer.filled]
        if missing_layers:
            raise CannotContinue(f"the model has cached nothing in the layers {missing_layers}")
        for row_number in rows:
            new_columns = slice(self.prefix, self.prefix + int(self.lengths[row_number]))
            new_states = (states[:, row_number, :, new_columns] for states in (self._keys, self._values))
            self.prefixes[row_number].append(
                *(part.clone(memory_format=torch.contiguous_format) for part in new_states)
            )

    def release(self) -> None:
        """Gives the padded keys and values back."""
        self.cache.layers = []
        self._keys = self._values = torch.empty(0)
