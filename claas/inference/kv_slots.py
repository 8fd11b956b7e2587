"""The KV cache of running replies: one slot a row, kept gapless, written in place.

Shape legend
    S  slots   C  capacity in tokens   H  KV heads   D  head size   B  running rows (slots 0..B−1)   L  tokens of the longest row

A step reads and writes views of slots 0..B−1: nothing is concatenated or gathered for a token, however long the replies are. Slots
grow by doubling and are given back when they stand empty. It does not know what a row is for, nor where attention is masked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

MIN_SLOTS = 2
MIN_TOKENS = 256


class KVSlots(Cache):  # type: ignore[misc]
    """At most `max_slots` rows of at most `max_tokens` tokens. A `transformers.Cache` for forwards of one token a row.

    Memory is bounded by 2 · layers · max_slots · max_tokens · H · D elements, and follows what is really in use.
    """

    def __init__(self, max_slots: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self._max_slots = max_slots
        self._max_tokens = max_tokens
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._slots = 0
        self._capacity = 0
        self._lengths: list[int] = []
        self._write_B = torch.empty(0, dtype=torch.long)
        self._view = (0, 0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held by each row."""
        return tuple(self._lengths)

    @property
    def n_elements(self) -> int:
        """Elements allocated for keys and values."""
        return sum(tensor.numel() for tensor in (*self._keys, *self._values))

    def append(self, prefilled: DynamicCache, row: int, n_tokens: int) -> None:
        """Take row `row` of a prefill's cache, its first `n_tokens` tokens, as a new row behind the others."""
        if not self._keys:
            self._keys = [_empty(layer.keys) for layer in prefilled.layers]
            self._values = [_empty(layer.values) for layer in prefilled.layers]
        slot = len(self._lengths)
        self._fit(slot + 1, n_tokens + 1)
        for keys, values, layer in zip(self._keys, self._values, prefilled.layers, strict=True):
            keys[slot, :n_tokens] = layer.keys[row, :, :n_tokens].transpose(0, 1)
            values[slot, :n_tokens] = layer.values[row, :, :n_tokens].transpose(0, 1)
        self._lengths.append(n_tokens)

    def remove(self, row: int) -> None:
        """Drop a row; the last one takes its place, so callers do the same with whatever they keep for each row."""
        last = len(self._lengths) - 1
        if row != last:
            n_tokens = self._lengths[last]
            for tensor in (*self._keys, *self._values):
                tensor[row, :n_tokens] = tensor[last, :n_tokens]
            self._lengths[row] = n_tokens
        self._lengths.pop()
        if not self._lengths:
            self.clear()

    def wipe(self, row: int) -> None:
        """Zero a row whose numbers are not finite, before it is removed: even behind a mask they would spread to who comes there next."""
        for tensor in (*self._keys, *self._values):
            tensor[row].zero_()

    def clear(self) -> None:
        """Drop all rows and their memory."""
        self._keys, self._values, self._lengths = [], [], []
        self._slots = self._capacity = 0

    def begin_step(self) -> None:
        """Make room for one more token in every row; call before each forward of one token a row."""
        longest = max(self._lengths) + 1
        self._fit(len(self._lengths), longest)
        self._write_B = torch.tensor([row * self._capacity + n for row, n in enumerate(self._lengths)], device=self._keys[0].device)
        self._view = (len(self._lengths), longest)

    def end_step(self) -> None:
        """The forward is done: every row holds one token more."""
        self._lengths = [n + 1 for n in self._lengths]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write (B, H, 1, D) of one layer; returns the views (B, H, L, D) to attend to."""
        rows, longest = self._view
        views = []
        for tensor, states in ((self._keys[layer_idx], key_states), (self._values[layer_idx], value_states)):
            tensor.flatten(0, 1).index_copy_(0, self._write_B, states.squeeze(2))
            views.append(tensor[:rows, :longest].transpose(1, 2))
        return views[0], views[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._view[1] - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._view[1], 0

    def _fit(self, slots: int, n_tokens: int) -> None:
        """Reallocate where the capacity is too small, or in tokens four times too large."""
        assert slots <= self._max_slots and n_tokens <= self._max_tokens
        longest = max((n_tokens, *self._lengths))
        wanted_slots = self._slots if slots <= self._slots else _doubled(slots, MIN_SLOTS, self._max_slots)
        fits = longest <= self._capacity <= max(4 * longest, MIN_TOKENS)
        wanted_capacity = self._capacity if fits else _doubled(longest, MIN_TOKENS, self._max_tokens)
        if (wanted_slots, wanted_capacity) == (self._slots, self._capacity):
            return
        kept = min(self._capacity, wanted_capacity)
        for tensors in (self._keys, self._values):
            for i, old in enumerate(tensors):
                # Zeros: what a mask hides must still be finite.
                tensors[i] = old.new_zeros(wanted_slots, wanted_capacity, *old.shape[2:])
                tensors[i][: len(old), :kept] = old[:, :kept]
        self._slots, self._capacity = wanted_slots, wanted_capacity


def _empty(states: Tensor) -> Tensor:
    """No slots yet, of the heads, size, dtype and device of (B, H, L, D)."""
    return states.new_zeros(0, 0, states.shape[1], states.shape[3])


def _doubled(needed: int, least: int, most: int) -> int:
    """The smallest doubling of `least` that holds `needed`, at most `most`."""
    size = least
    while size < needed:
        size *= 2
    return min(size, most)
