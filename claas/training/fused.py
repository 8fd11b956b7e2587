"""Llama's decoder layer for training on a CPU: two autograd functions with gradients written by hand, in place of some thirty nodes.

    attention    y = x + o(attend(rotate(q(n)), rotate(k(n)), v(n)))    n = norm(x)
    mlp          y = x + down(silu(gate(n)) · up(n))                    n = norm(x)

What it saves over the plain layer: products that read the same rows share their LoRA A; sums go into the product that comes last; scores
are taken for a block of queries at a time and only over keys they can see; nothing is kept that is cheap to make again. Arithmetic is that
of the plain layer with transformers' eager attention: products in the model's dtype, norms and softmax in float32. Weights are frozen: only
LoRA's A and B and x get gradients. It knows no model beyond the layer; other models keep their own layers.

Shape legend
    B  sequences   L  positions   N  B·L rows   D  hidden   F  intermediate   I  in features   O  out features   R  ranks, joined
    K  key heads   G  query heads a key head    E  head size   Z  B·K   Q  queries of a block
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from claas.training.lora import LoraLinear

QUERIES = 128  # of a block: its scores stay in a CPU's cache


def fuse(model: nn.Module) -> None:
    """Let every plain Llama layer of this tree compute as above. Parameters, their names and the switch for the adapter stay."""
    module: Any
    for module in model.modules():
        if type(module) is LlamaDecoderLayer and module.self_attn.config.hidden_act == "silu":
            module.__class__ = FusedLlamaLayer


class FusedLlamaLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """`LlamaDecoderLayer` without cache and dropout, over right-padded rows."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, L, D) → (B, L, D). A mask, as other attention kernels want one, is for the plain layer."""
        if attention_mask is not None:
            plain: Tensor = super().forward(hidden_states, attention_mask, **kwargs)
            return plain
        attn, mlp = self.self_attn, self.mlp
        qkv, o = _Linears(attn.q_proj, attn.k_proj, attn.v_proj), _Linears(attn.o_proj)
        gate_up, down = _Linears(mlp.gate_proj, mlp.up_proj), _Linears(mlp.down_proj)
        heads = _Heads(attn.num_key_value_groups, attn.head_dim, attn.scaling)
        first, second = _Norm(self.input_layernorm), _Norm(self.post_attention_layernorm)
        cos, sin = kwargs["position_embeddings"]
        x_BLD: Tensor = _Attention.apply(hidden_states, cos, sin, first, heads, qkv, o, *qkv.halves, *o.halves)  # type: ignore[no-untyped-call]
        y_BLD: Tensor = _Mlp.apply(x_BLD, second, gate_up, down, *gate_up.halves, *down.halves)  # type: ignore[no-untyped-call]
        return y_BLD


# --- parts of a layer, forward and backward by hand ---


class _Norm:
    """RMSNorm with a frozen weight, in float32."""

    def __init__(self, module: Any) -> None:
        self._weight_D: Tensor = module.weight
        self._eps: float = module.variance_epsilon

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The normed rows, (N, D), and what they were multiplied with, (N, 1) in float32."""
        wide_ND = x_ND.float()
        scale_N1 = wide_ND.square().mean(-1, keepdim=True).add_(self._eps).rsqrt_()
        return (wide_ND * scale_N1).to(x_ND.dtype).mul_(self._weight_D), scale_N1

    def backward(self, x_ND: Tensor, scale_N1: Tensor, grad_ND: Tensor, residual_ND: Tensor) -> Tensor:
        """Gradient of x, the residual's included, (N, D)."""
        wide_ND, grad = x_ND.float(), grad_ND.float().mul_(self._weight_D.float())
        pull_N1 = (grad * wide_ND).mean(-1, keepdim=True).mul_(scale_N1.pow(3))
        return grad.mul_(scale_N1).addcmul_(wide_ND, pull_N1, value=-1).add_(residual_ND).to(x_ND.dtype)


class _Linears:
    """Frozen linear layers that read the same rows, each with LoRA, of rank 0 where it carries none or is switched off.

    `halves` are A (R, I) and B (O, R) of each in turn, float32. They go through the autograd function, which hands them back to `lora`.
    """

    def __init__(self, *modules: Any) -> None:
        self._bases: list[nn.Linear] = [m.base_layer if isinstance(m, LoraLinear) else m for m in modules]
        self._scalings: list[float] = []
        self.halves: list[Tensor] = []
        for module, base in zip(modules, self._bases, strict=True):
            if isinstance(module, LoraLinear) and not module.disable_adapters:
                (name,) = module.active_adapters
                self._scalings.append(module.scaling[name])
                self.halves += [module.lora_A[name].weight, module.lora_B[name].weight]
            else:
                self._scalings.append(0.0)
                self.halves += [base.weight.new_empty(0, base.in_features), base.weight.new_empty(base.out_features, 0)]

    def lora(self, halves: Sequence[Tensor]) -> list[Tensor]:
        """All A's in one, (R, I), then each B times its scaling, (O, r): all in the model's dtype."""
        dtype = self._bases[0].weight.dtype
        return [
            torch.cat([a.to(dtype) for a in halves[::2]]),
            *((b * scaling).to(dtype) for b, scaling in zip(halves[1::2], self._scalings, strict=True)),
        ]

    def forward(self, x_NI: Tensor, lora: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """What each layer gives, (N, O), and x through the A's, (N, R)."""
        a_RI, *bs = lora
        low_NR = x_NI @ a_RI.T
        outs = []
        for base, b, low in zip(self._bases, bs, low_NR.split([b.shape[1] for b in bs], dim=1), strict=True):
            out_NO = functional.linear(x_NI, base.weight, base.bias)
            outs.append(out_NO.addmm_(low, b.T) if b.shape[1] else out_NO)
        return outs, low_NR

    def backward(
        self, x_NI: Tensor, low_NR: Tensor, lora: Sequence[Tensor], grads: Sequence[Tensor], need_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of x, (N, I), and of `halves`."""
        a_RI, *bs = lora
        ranks = [b.shape[1] for b in bs]
        grad_low_NR = torch.cat([grad @ b for grad, b in zip(grads, bs, strict=True)], dim=1)
        halves: list[Tensor] = []
        columns = zip((grad_low_NR.T @ x_NI).float().split(ranks), grads, low_NR.split(ranks, dim=1), self._scalings, strict=True)
        for grad_a, grad, low, scaling in columns:
            halves += [grad_a, (grad.T @ low).float().mul_(scaling)]
        if not need_x:
            return None, halves
        grad_x = grads[0] @ self._bases[0].weight
        for grad, base in zip(grads[1:], self._bases[1:], strict=True):
            grad_x.addmm_(grad, base.weight)
        return grad_x.addmm_(grad_low_NR, a_RI), halves


class _Heads:
    """Causal attention with rotary positions. Queries lie as (Z, L·G, E), so that those of one key head and a range of positions adjoin."""

    def __init__(self, groups: int, size: int, scaling: float) -> None:
        self.groups, self._size, self._scaling = groups, size, scaling

    def split(self, x_ND: Tensor, shape_BL: torch.Size, groups: int, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rows of heads, (N, K·G·E), as (Z, L·G, E), turned to their positions."""
        x = x_ND.view(*shape_BL, -1, groups, self._size).transpose(1, 2)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        (out.copy_(x) if turn is None else _rotate(x, *turn, out))
        return out.view(-1, shape_BL[1] * groups, self._size)

    def join(self, x_ZRE: Tensor, shape_BL: torch.Size, groups: int, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """The way back: (Z, L·G, E) as (N, K·G·E)."""
        B, L = shape_BL
        x = x_ZRE.view(B, -1, L, groups, self._size)
        out = torch.empty(B, L, x.shape[1], groups, self._size, dtype=x.dtype, device=x.device)
        (out.transpose(1, 2).copy_(x) if turn is None else _rotate(x, *turn, out.transpose(1, 2)))
        return out.view(B * L, -1)

    def turns(self, cos: Tensor, sin: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Cosine and sine for queries, with the scaling in them, and for keys: (B or 1, 1, L, 1, E/2)."""
        half = self._size // 2
        cos, sin = cos[:, None, :, None, :half], sin[:, None, :, None, :half]
        return (cos * self._scaling, sin * self._scaling), (cos, sin)

    def _blocks(self, L: int) -> list[tuple[slice, slice, int]]:
        """Of each block of queries: its rows, and the keys it sees in part and their end."""
        ends = [min(at + QUERIES, L) for at in range(0, L, QUERIES)]
        return [(slice((at * QUERIES) * self.groups, end * self.groups), slice(at * QUERIES, end), end) for at, end in enumerate(ends)]

    def _shares(self, q_ZRE: Tensor, k_ZLE: Tensor, rows: slice, seen: slice, mask: Tensor) -> Tensor:
        """Softmax of a block's scores, (Z, Q·G, keys up to the block's end)."""
        scores = q_ZRE[:, rows] @ k_ZLE[:, : seen.stop].transpose(1, 2)
        scores[:, :, seen].add_(mask[: scores.shape[1], : seen.stop - seen.start])
        return scores.softmax(-1)

    def _mask(self, like: Tensor, L: int) -> Tensor:
        """(Q·G, Q): −∞ where a key stands after the query."""
        side = min(L, QUERIES)
        return like.new_full((side, side), -torch.inf).triu_(1).repeat_interleave(self.groups, 0)

    def forward(self, q_ZRE: Tensor, k_ZLE: Tensor, v_ZLE: Tensor) -> Tensor:
        """(Z, L·G, E)."""
        L = k_ZLE.shape[1]
        mask = self._mask(q_ZRE, L)
        outs = [self._shares(q_ZRE, k_ZLE, rows, seen, mask) @ v_ZLE[:, :end] for rows, seen, end in self._blocks(L)]
        return torch.cat(outs, dim=1)

    def backward(self, q_ZRE: Tensor, k_ZLE: Tensor, v_ZLE: Tensor, grad_ZRE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v. The last block sees every key, so it comes first and the others add to it."""
        L = k_ZLE.shape[1]
        mask = self._mask(q_ZRE, L)
        grad_q = torch.empty_like(q_ZRE)
        grad_k = grad_v = torch.empty(0)
        for rows, seen, end in reversed(self._blocks(L)):
            share, grad = self._shares(q_ZRE, k_ZLE, rows, seen, mask), grad_ZRE[:, rows]
            grad_scores = torch._softmax_backward_data(grad @ v_ZLE[:, :end].transpose(1, 2), share, -1, share.dtype)
            grad_q[:, rows] = grad_scores @ k_ZLE[:, :end]
            of_k, of_v = grad_scores.transpose(1, 2) @ q_ZRE[:, rows], share.transpose(1, 2) @ grad
            if end == L:
                grad_k, grad_v = of_k, of_v
            else:
                grad_k[:, :end] += of_k
                grad_v[:, :end] += of_v
        return grad_q, grad_k, grad_v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + E/2}) by its angle, into `out`."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    torch.mul(low, cos, out=out[..., :half]).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out[..., half:]).addcmul_(low, sin)
    return out


def _back(turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return turn[0], -turn[1]


# --- the layer's two halves ---


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BLD: Tensor, cos: Tensor, sin: Tensor, norm: _Norm, heads: _Heads, qkv: _Linears, o: _Linears, *halves: Tensor
    ) -> Tensor:
        shape_BL, x_ND = x_BLD.shape[:2], x_BLD.flatten(0, 1)
        q_turn, k_turn = heads.turns(cos, sin)
        lora, lora_o = qkv.lora(halves[:6]), o.lora(halves[6:])
        n_ND, scale_N1 = norm.forward(x_ND)
        (q, k, v), low_NR = qkv.forward(n_ND, lora)
        q = heads.split(q, shape_BL, heads.groups, q_turn)
        k, v = heads.split(k, shape_BL, 1, k_turn), heads.split(v, shape_BL, 1, None)
        mixed_NI = heads.join(heads.forward(q, k, v), shape_BL, heads.groups, None)
        (y_ND,), low_o_NR = o.forward(mixed_NI, lora_o)
        ctx.parts = norm, heads, qkv, o
        ctx.save_for_backward(x_ND, cos, sin, n_ND, scale_N1, low_NR, q, k, v, mixed_NI, low_o_NR, *lora, *lora_o)
        return y_ND.add_(x_ND).view_as(x_BLD)

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, cos, sin, n_ND, scale_N1, low_NR, q, k, v, mixed_NI, low_o_NR, *lora = ctx.saved_tensors
        norm, heads, qkv, o = ctx.parts
        shape_BL, grad_ND = grad_BLD.shape[:2], grad_BLD.flatten(0, 1)
        q_turn, k_turn = heads.turns(cos, sin)
        grad_mixed, halves_o = o.backward(mixed_NI, low_o_NR, lora[4:], [grad_ND], True)
        dq, dk, dv = heads.backward(q, k, v, heads.split(grad_mixed, shape_BL, heads.groups, None))
        dq = heads.join(dq, shape_BL, heads.groups, _back(q_turn))
        dk, dv = heads.join(dk, shape_BL, 1, _back(k_turn)), heads.join(dv, shape_BL, 1, None)
        grad_n, halves = qkv.backward(n_ND, low_NR, lora[:4], [dq, dk, dv], ctx.needs_input_grad[0])
        grad_x = None if grad_n is None else norm.backward(x_ND, scale_N1, grad_n, grad_ND).view_as(grad_BLD)
        return grad_x, None, None, None, None, None, None, *halves, *halves_o


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, norm: _Norm, gate_up: _Linears, down: _Linears, *halves: Tensor) -> Tensor:
        x_ND = x_BLD.flatten(0, 1)
        lora, lora_down = gate_up.lora(halves[:4]), down.lora(halves[4:])
        n_ND, scale_N1 = norm.forward(x_ND)
        (gate_NF, up_NF), low_NR = gate_up.forward(n_ND, lora)
        opened_NF = functional.silu(gate_NF)
        (y_ND,), low_down_NR = down.forward(opened_NF * up_NF, lora_down)
        ctx.parts = norm, gate_up, down
        ctx.save_for_backward(x_ND, n_ND, scale_N1, low_NR, gate_NF, up_NF, opened_NF, low_down_NR, *lora, *lora_down)
        return y_ND.add_(x_ND).view_as(x_BLD)

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, n_ND, scale_N1, low_NR, gate_NF, up_NF, opened_NF, low_down_NR, *lora = ctx.saved_tensors
        norm, gate_up, down = ctx.parts
        grad_ND = grad_BLD.flatten(0, 1)
        grad_NF, halves_down = down.backward(opened_NF * up_NF, low_down_NR, lora[3:], [grad_ND], True)
        grad_gate = torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF)
        grad_n, halves = gate_up.backward(n_ND, low_NR, lora[:3], [grad_gate, grad_NF.mul_(opened_NF)], True)
        return norm.backward(x_ND, scale_N1, grad_n, grad_ND).view_as(grad_BLD), None, None, None, *halves, *halves_down
