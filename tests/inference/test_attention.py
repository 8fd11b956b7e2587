"""Attention row by row is attention with the padding masked away."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from claas.inference.attention import rows_attention, worth_it


@pytest.mark.parametrize("groups", [1, 3])
def test_row_by_row_equals_padded_and_masked(groups: int) -> None:
    lengths, heads, size = [40, 3, 7], 2, 8
    module = nn.Module()
    module.num_key_value_groups = groups  # type: ignore[assignment]
    query = torch.randn(3, heads * groups, 1, size)
    key, value = torch.randn(2, 3, heads, max(lengths), size)
    mask = torch.zeros(3, 1, 1, max(lengths))
    for row, n in enumerate(lengths):
        mask[row, ..., n:] = float("-inf")
    padded, _ = rows_attention(module, query, key, value, mask)
    by_row, _ = rows_attention(module, query, key, value, mask, row_lengths=lengths)
    assert by_row.shape == (3, 1, heads * groups, size)
    torch.testing.assert_close(by_row, padded)


@pytest.mark.parametrize(
    ("lengths", "worth"), [([100], False), ([100, 100], False), ([100, 60, 40], False), ([100, 10], False), ([100, 1, 1], True)]
)
def test_it_is_worth_it_where_padding_doubles_the_work(lengths: list[int], worth: bool) -> None:
    assert worth_it(lengths) == worth
