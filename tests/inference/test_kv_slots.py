"""KV slots against the plainest model of them: a list of rows, each a tensor that grows."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from claas.inference.kv_slots import KVSlots

LAYERS, HEADS, SIZE, MAX_SLOTS, MAX_TOKENS = 2, 3, 4, 5, 600


def prefilled(rows: int, tokens: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(torch.randn(rows, HEADS, tokens, SIZE), torch.randn(rows, HEADS, tokens, SIZE), layer)
    return cache


class Plain:
    """One (H, n, D) pair for each layer of each row."""

    def __init__(self) -> None:
        self.rows: list[list[tuple[Tensor, Tensor]]] = []

    def append(self, cache: DynamicCache, row: int, n: int) -> None:
        self.rows.append([(layer.keys[row, :, :n], layer.values[row, :, :n]) for layer in cache.layers])

    def remove(self, row: int) -> None:
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def grow(self, layer: int, keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
        for row, key, value in zip(self.rows, keys_BHTD, values_BHTD, strict=True):
            row[layer] = (torch.cat([row[layer][0], key], 1), torch.cat([row[layer][1], value], 1))


def step(slots: KVSlots, plain: Plain) -> None:
    """One token in every row; what the slots show must be what the plain rows hold."""
    slots.begin_step()
    for layer in range(LAYERS):
        new = torch.randn(2, len(plain.rows), HEADS, 1, SIZE)
        keys, values = slots.update(new[0], new[1], layer)
        plain.grow(layer, new[0], new[1])
        assert keys.shape == values.shape == (len(plain.rows), HEADS, max(slots.lengths) + 1, SIZE)
        assert keys.isfinite().all() and values.isfinite().all()
        for row, (key, value) in enumerate(held[layer] for held in plain.rows):
            assert torch.equal(keys[row, :, : key.shape[1]], key)
            assert torch.equal(values[row, :, : value.shape[1]], value)
    slots.end_step()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rows_that_come_grow_and_go_keep_what_is_theirs(seed: int) -> None:
    chance = random.Random(seed)
    slots, plain = KVSlots(MAX_SLOTS, MAX_TOKENS), Plain()
    for _ in range(30):
        if len(plain.rows) < MAX_SLOTS and chance.random() < 0.4:
            n = chance.choice((1, 3, 60, 255, 256, 400))
            cache, row = prefilled(2, n + chance.randint(0, 3)), chance.randint(0, 1)
            slots.append(cache, row, n)
            plain.append(cache, row, n)
        if plain.rows:
            step(slots, plain)
        if plain.rows and chance.random() < 0.3:
            row = chance.randrange(len(plain.rows))
            slots.remove(row)
            plain.remove(row)
        assert slots.lengths == tuple(row[0][0].shape[1] for row in plain.rows)


def test_memory_follows_use_and_ends_with_it() -> None:
    slots = KVSlots(MAX_SLOTS, MAX_TOKENS)
    slots.append(prefilled(1, 500), 0, 500)
    large = slots.n_elements
    assert large <= 2 * LAYERS * MAX_SLOTS * MAX_TOKENS * HEADS * SIZE
    slots.append(prefilled(1, 5), 0, 5)
    slots.remove(0)
    slots.begin_step()
    assert slots.n_elements < large
    slots.remove(0)
    assert slots.n_elements == 0 and slots.lengths == ()


def test_rows_are_read_where_they_lie() -> None:
    slots = KVSlots(MAX_SLOTS, MAX_TOKENS)
    for _ in range(3):
        slots.append(prefilled(1, 10), 0, 10)
    slots.begin_step()
    new = torch.randn(3, HEADS, 1, SIZE)
    first, _ = slots.update(new, new, 0)
    second, _ = slots.update(new, new, 0)
    assert first.data_ptr() == second.data_ptr()


def test_what_was_no_number_is_gone_with_its_row() -> None:
    slots, plain = KVSlots(MAX_SLOTS, MAX_TOKENS), Plain()
    sound, broken, next_one = prefilled(1, 30), prefilled(1, 40), prefilled(1, 9)
    for layer in broken.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    slots.append(sound, 0, 30)
    slots.append(broken, 0, 40)
    slots.wipe(1)
    slots.remove(1)
    slots.append(next_one, 0, 9)  # the row's old place, and shorter: what is left there is hidden by a mask only
    plain.append(sound, 0, 30)
    plain.append(next_one, 0, 9)
    step(slots, plain)
