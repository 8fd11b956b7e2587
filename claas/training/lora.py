"""A LoRA layer for training that costs little more than its base layer. PEFT creates it, names its parameters and switches it off.

Shape legend
    I  in features   O  out features   R  rank   N  positions of all sequences, joined

PEFT's own layer computes x·Aᵀ·Bᵀ in float32 with every intermediate kept for the backward pass. Here the products are taken in the
model's dtype with float32 sums, added to the base layer's output in place, and only x, which the graph holds anyway, and x·Aᵀ are kept.
A and B themselves and their gradients stay float32. There is no dropout: teacher, student and rescoring see the same network.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional


class LoraLinear(lora.Linear):  # type: ignore[misc]
    """`base(x) + scaling · x·Aᵀ·Bᵀ` for the one adapter that a trainer's tree carries."""

    def forward(self, x: Tensor) -> Tensor:
        base: nn.Linear = self.base_layer
        if self.disable_adapters:
            return functional.linear(x, base.weight, base.bias)
        (name,) = self.active_adapters
        a_RI, b_OR, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        out_NO: Tensor = _LoraProduct.apply(x.flatten(0, -2), base.weight, base.bias, a_RI, b_OR, scaling)  # type: ignore[no-untyped-call]
        return out_NO.view(*x.shape[:-1], -1)


class _LoraProduct(torch.autograd.Function):
    """The base weight is frozen: it gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
        a, b = a_RI.to(x_NI.dtype), (b_OR * scaling).to(x_NI.dtype)
        low_NR = x_NI @ a.T
        ctx.save_for_backward(x_NI, low_NR, w_OI, a, b)
        ctx.scaling = scaling
        return functional.linear(x_NI, w_OI, bias_O).addmm_(low_NR, b.T)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x_NI, low_NR, w_OI, a, b = ctx.saved_tensors
        grad_low_NR = grad_NO @ b
        grad_x = (grad_NO @ w_OI).addmm_(grad_low_NR, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, (grad_low_NR.T @ x_NI).float(), (grad_NO.T @ low_NR).float().mul_(ctx.scaling), None
