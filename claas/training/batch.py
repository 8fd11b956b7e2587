"""Ragged sequences → right-padded tensors.

Shape legend
    B  sequences of a micro-batch   L  padded length   P  positions that all sequences begin with   S  the rest, L = P + S
    N  response tokens of the micro-batch, all sequences joined

Padding stands to the right of causal attention, so it needs no mask: no real position can see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from claas.training.samples import shared_length


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token ids ready for one forward: what all begin with, each one's own, and where in the flattened (B·S) hidden states of these each
    response token is predicted."""

    shared_P: Tensor
    own_BS: Tensor
    predict_N: Tensor
    targets_N: Tensor

    def whole(self) -> Tensor:
        """Every sequence from its first token on, (B, L)."""
        return torch.cat([self.shared_P.expand(len(self.own_BS), -1), self.own_BS], dim=1)

    def to(self, device: torch.device) -> Sequences:
        return Sequences(self.shared_P.to(device), self.own_BS.to(device), self.predict_N.to(device), self.targets_N.to(device))


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Sequences:
    """Right-pad prompt + response of each sequence.

    The token at position t is predicted at t − 1, so the last token of a prompt is never shared.
    """
    P = shared_length(prompts)
    L = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids_BL = torch.zeros(len(prompts), L, dtype=torch.long)
    predict: list[Tensor] = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids_BL[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        first = row * (L - P) + len(prompt) - P - 1
        predict.append(torch.arange(first, first + len(response)))
    targets_N = torch.tensor([token for response in responses for token in response])
    return Sequences(ids_BL[0, :P], ids_BL[:, P:], torch.cat(predict), targets_N)
