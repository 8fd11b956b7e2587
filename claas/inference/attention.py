"""Attention for one token a row over rows of very different lengths: each row over its own tokens, instead of all over the longest.

A padded call costs what the longest row costs, times the number of rows: one long chat would slow down every short one beside it.
transformers looks attention up by name, so importing this file gives it a name there; it does nothing until a tree is set to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "claas_rows"


def worth_it(lengths: Sequence[int]) -> bool:
    """Whether padding would at least double the work."""
    return len(lengths) * max(lengths) >= 2 * sum(lengths)


def rows_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' own `sdpa`; with `row_lengths`, row by row without a mask. Returns (B, T, H, D)."""
    if row_lengths is None:
        output_BTHD, _ = sdpa_attention_forward(module, query_BHTD, key_BHLD, value_BHLD, attention_mask, **kwargs)
        return output_BTHD, None
    rows = (
        sdpa_attention_forward(module, query_BHTD[i : i + 1], key_BHLD[i : i + 1, :, :n], value_BHLD[i : i + 1, :, :n], None, **kwargs)[0]
        for i, n in enumerate(row_lengths)
    )
    return torch.cat(list(rows)), None


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
