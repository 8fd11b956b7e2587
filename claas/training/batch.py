"""Ragged sequences → right-padded tensors.

Shape legend
    B  sequences of a micro-batch   L  padded length   N  response tokens of the micro-batch, all sequences joined

Padding stands to the right of causal attention, so it needs no mask: no real position can see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token ids ready for one forward: `ids_BL`, and where in the flattened (B·L) hidden states each response token is predicted."""

    ids_BL: Tensor
    predict_N: Tensor
    targets_N: Tensor

    def to(self, device: torch.device) -> Sequences:
        return Sequences(self.ids_BL.to(device), self.predict_N.to(device), self.targets_N.to(device))


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Sequences:
    """Right-pad prompt + response of each sequence. The token at position t is predicted at t − 1."""
    L = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids_BL = torch.zeros(len(prompts), L, dtype=torch.long)
    predict: list[Tensor] = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids_BL[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        first = row * L + len(prompt) - 1
        predict.append(torch.arange(first, first + len(response)))
    return Sequences(ids_BL, torch.cat(predict), torch.tensor([token for response in responses for token in response]))
