"""Llama's decoder for training on a CPU: two autograd functions a layer, gradients written by hand, in place of some thirty nodes.

    attention    y = x + o(attend(rotate(q(n)), rotate(k(n)), v(n)))    n = norm(x)
    mlp          y = x + down(silu(gate(n)) · up(n))                    n = norm(x)

What it saves over the plain layers: tokens that all sequences of a micro-batch begin with, such as a system prompt, are computed once;
the last layer's mlp is of positions that predict something only; products that read the same rows share their LoRA A; sums go into the
product that comes last; scores are taken for a block of queries at a time and only over keys they can see; nothing is kept that is cheap
to make again. Arithmetic is that of the plain layer with transformers' eager attention: products in the model's dtype, norms and softmax
in float32. Weights are frozen: only LoRA's A and B and x get gradients. Other models keep their own layers.

Shape legend
    B  sequences   P  positions that all begin with   S  each one's own, right-padded   M  P + B·S rows, shared ones first
    N  any rows   L  queries of a sequence   D  hidden   F  intermediate   I  in features   O  out features   R  ranks, joined
    K  key heads   G  query heads a key head    E  head size   Z  B·K   Q  queries of a block   T  keys, L or P + L
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from claas.training.lora import LoraLinear

QUERIES = 128  # of a block: its scores stay in a CPU's cache


def fuse(decoder: nn.Module) -> None:
    """Let a plain Llama decoder compute as above. Parameters, their names and the switch for the adapter stay."""
    model: Any = decoder
    if type(model) is not LlamaModel or model.config.hidden_act != "silu":
        return
    layers: list[Any] = list(model.layers)
    if all(type(layer) is LlamaDecoderLayer for layer in layers):
        model.__class__ = FusedLlamaModel
        for layer in layers:
            layer.__class__ = FusedLlamaLayer


class FusedLlamaModel(LlamaModel):  # type: ignore[misc]
    """`LlamaModel` over a micro-batch whose sequences begin alike, without cache and dropout."""

    def forward(self, shared_P: Tensor, own_BS: Tensor, predict_N: Tensor) -> Tensor:
        """Token ids → final hidden states (N, D) of those rows of the flattened (B·S) own positions that `predict_N` names."""
        rows = _Rows(len(shared_P), *own_BS.shape)
        x_MD = self.embed_tokens(torch.cat([shared_P, own_BS.flatten()]))
        cos, sin = self.rotary_emb(x_MD, position_ids=torch.arange(rows.shared + rows.length, device=x_MD.device)[None])
        *others, last = self.layers
        for layer in others:
            x_MD = layer(x_MD, cos=cos, sin=sin, rows=rows)
        out_ND: Tensor = self.norm(last(x_MD, cos=cos, sin=sin, rows=rows, wanted_N=predict_N + rows.shared))
        return out_ND


class FusedLlamaLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """`LlamaDecoderLayer` over rows of shared and own positions."""

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, rows: _Rows, wanted_N: Tensor | None = None) -> Tensor:
        """(M, D) → (M, D); where some rows only are wanted, (N, D)."""
        attn, mlp = self.self_attn, self.mlp
        qkv, o = _Linears(attn.q_proj, attn.k_proj, attn.v_proj), _Linears(attn.o_proj)
        gate_up, down = _Linears(mlp.gate_proj, mlp.up_proj), _Linears(mlp.down_proj)
        heads = _Heads(attn.num_key_value_groups, attn.head_dim, attn.scaling)
        first, second = _Norm(self.input_layernorm), _Norm(self.post_attention_layernorm)
        x_MD: Tensor = _Attention.apply(hidden_states, cos, sin, rows, first, heads, qkv, o, *qkv.halves, *o.halves)  # type: ignore[no-untyped-call]
        x_ND = x_MD if wanted_N is None else x_MD[wanted_N]
        y_ND: Tensor = _Mlp.apply(x_ND, second, gate_up, down, *gate_up.halves, *down.halves)  # type: ignore[no-untyped-call]
        return y_ND


@dataclass(frozen=True, slots=True)
class _Rows:
    """How a micro-batch lies in M rows: `shared` ones first, then `batch` sequences of `length` each."""

    shared: int
    batch: int
    length: int

    def parts(self) -> list[tuple[slice, tuple[int, int], slice]]:
        """Of the shared rows, if any, and the others: where they lie, as how many sequences of what length, and their positions."""
        own = (slice(self.shared, None), (self.batch, self.length), slice(self.shared, None))
        return [(slice(self.shared), (1, self.shared), slice(self.shared)), own] if self.shared else [own]


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
    """Causal attention with rotary positions. Queries lie as (Z, L·G, E), so that those of one key head and a range of positions adjoin.

    Keys may be more than the queries' own, (Z, T, E): those before are seen by every query.
    """

    def __init__(self, groups: int, size: int, scaling: float) -> None:
        self._groups, self._size, self._scaling = groups, size, scaling

    def forward(self, rows: _Rows, cos: Tensor, sin: Tensor, q_MI: Tensor, k_MI: Tensor, v_MI: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What each row takes of the rows that it sees, (M, K·G·E), and the q, k, v of every part for the way back."""
        mixed_MI = torch.empty_like(q_MI)
        kept: list[Tensor] = []
        for part, shape_BL, positions in rows.parts():
            q_turn, k_turn = self._turns(cos, sin, positions)
            q = self._split(q_MI[part], shape_BL, self._groups, q_turn)
            k, v = self._split(k_MI[part], shape_BL, 1, k_turn), self._split(v_MI[part], shape_BL, 1, None)
            if kept:
                k, v = _after_shared(kept[1], k), _after_shared(kept[2], v)
            self._join(self._attend(q, k, v), shape_BL, self._groups, None, mixed_MI[part])
            kept += [q, k, v]
        return mixed_MI, kept

    def backward(self, rows: _Rows, cos: Tensor, sin: Tensor, kept: Sequence[Tensor], grad_MI: Tensor) -> list[Tensor]:
        """Gradients of q, k and v, (M, features) each."""
        heads, shared = len(kept[-2]) // rows.batch, rows.shared
        grads = [torch.empty_like(grad_MI), *(grad_MI.new_empty(len(grad_MI), heads * self._size) for _ in "kv")]
        given: list[Tensor] = []  # by the own rows to the shared ones' keys and values
        for at, (part, shape_BL, positions) in reversed(list(enumerate(rows.parts()))):
            q_turn, k_turn = self._turns(cos, sin, positions)
            q, k, v = kept[3 * at : 3 * at + 3]
            dq, dk, dv = self._attend_back(q, k, v, self._split(grad_MI[part], shape_BL, self._groups, None))
            if at:
                given = [_of_shared(dk, heads, shared), _of_shared(dv, heads, shared)]
                dk, dv = dk[:, shared:], dv[:, shared:]
            elif given:
                dk, dv = dk.add_(given[0]), dv.add_(given[1])
            self._join(dq, shape_BL, self._groups, _back(q_turn), grads[0][part])
            self._join(dk, shape_BL, 1, _back(k_turn), grads[1][part])
            self._join(dv, shape_BL, 1, None, grads[2][part])
        return grads

    def _split(self, x_ND: Tensor, shape_BL: tuple[int, int], groups: int, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rows of heads, (N, K·G·E), as (Z, L·G, E), turned to their positions."""
        x = x_ND.view(*shape_BL, -1, groups, self._size).transpose(1, 2)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        (out.copy_(x) if turn is None else _rotate(x, *turn, out))
        return out.view(-1, shape_BL[1] * groups, self._size)

    def _join(self, x_ZRE: Tensor, shape_BL: tuple[int, int], groups: int, turn: tuple[Tensor, Tensor] | None, out_ND: Tensor) -> None:
        """The way back: (Z, L·G, E) into rows (N, K·G·E)."""
        B, L = shape_BL
        x, out = x_ZRE.view(B, -1, L, groups, self._size), out_ND.view(B, L, -1, groups, self._size).transpose(1, 2)
        (out.copy_(x) if turn is None else _rotate(x, *turn, out))

    def _turns(self, cos: Tensor, sin: Tensor, positions: slice) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Cosine and sine for queries, with the scaling in them, and for keys: (1, 1, L, 1, E/2)."""
        half = self._size // 2
        cos, sin = cos[:, None, positions, None, :half], sin[:, None, positions, None, :half]
        return (cos * self._scaling, sin * self._scaling), (cos, sin)

    def _blocks(self, L: int, T: int) -> list[tuple[slice, slice, int]]:
        """Of each block of queries: its rows, and the keys it sees in part and their end."""
        before = T - L
        ends = [(at, min(at + QUERIES, L)) for at in range(0, L, QUERIES)]
        return [(slice(at * self._groups, end * self._groups), slice(before + at, before + end), before + end) for at, end in ends]

    def _shares(self, q_ZRE: Tensor, k_ZTE: Tensor, rows: slice, seen: slice, mask: Tensor) -> Tensor:
        """Softmax of a block's scores, (Z, Q·G, keys up to the block's end)."""
        scores = q_ZRE[:, rows] @ k_ZTE[:, : seen.stop].transpose(1, 2)
        scores[:, :, seen].add_(mask[: scores.shape[1], : seen.stop - seen.start])
        return scores.softmax(-1)

    def _mask(self, like: Tensor, L: int) -> Tensor:
        """(Q·G, Q): −∞ where a key stands after the query."""
        side = min(L, QUERIES)
        return like.new_full((side, side), -torch.inf).triu_(1).repeat_interleave(self._groups, 0)

    def _attend(self, q_ZRE: Tensor, k_ZTE: Tensor, v_ZTE: Tensor) -> Tensor:
        """(Z, L·G, E)."""
        L, T = q_ZRE.shape[1] // self._groups, k_ZTE.shape[1]
        mask = self._mask(q_ZRE, L)
        outs = [self._shares(q_ZRE, k_ZTE, rows, seen, mask) @ v_ZTE[:, :end] for rows, seen, end in self._blocks(L, T)]
        return torch.cat(outs, dim=1)

    def _attend_back(self, q_ZRE: Tensor, k_ZTE: Tensor, v_ZTE: Tensor, grad_ZRE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v. The last block sees every key, so it comes first and the others add to it."""
        L, T = q_ZRE.shape[1] // self._groups, k_ZTE.shape[1]
        mask = self._mask(q_ZRE, L)
        grad_q = torch.empty_like(q_ZRE)
        grad_k = grad_v = torch.empty(0)
        for rows, seen, end in reversed(self._blocks(L, T)):
            share, grad = self._shares(q_ZRE, k_ZTE, rows, seen, mask), grad_ZRE[:, rows]
            grad_scores = torch._softmax_backward_data(grad @ v_ZTE[:, :end].transpose(1, 2), share, -1, share.dtype)
            grad_q[:, rows] = grad_scores @ k_ZTE[:, :end]
            of_k, of_v = grad_scores.transpose(1, 2) @ q_ZRE[:, rows], share.transpose(1, 2) @ grad
            if end == T:
                grad_k, grad_v = of_k, of_v
            else:
                grad_k[:, :end] += of_k
                grad_v[:, :end] += of_v
        return grad_q, grad_k, grad_v


def _after_shared(shared_KPE: Tensor, own_ZLE: Tensor) -> Tensor:
    """Keys or values of each sequence, those of the shared positions before its own: (Z, P + L, E)."""
    K, P, E = shared_KPE.shape
    batch = len(own_ZLE) // K
    return torch.cat([shared_KPE.expand(batch, K, P, E).reshape(-1, P, E), own_ZLE], dim=1)


def _of_shared(grad_ZTE: Tensor, K: int, P: int) -> Tensor:
    """What all sequences together give back to the shared positions, (K, P, E)."""
    given_KPE: Tensor = grad_ZTE[:, :P].unflatten(0, (-1, K)).sum(0)
    return given_KPE


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
        ctx: Any,
        x_MD: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: _Rows,
        norm: _Norm,
        heads: _Heads,
        qkv: _Linears,
        o: _Linears,
        *halves: Tensor,
    ) -> Tensor:
        lora, lora_o = qkv.lora(halves[:6]), o.lora(halves[6:])
        n_MD, scale_M1 = norm.forward(x_MD)
        projected, low_MR = qkv.forward(n_MD, lora)
        mixed_MI, kept = heads.forward(rows, cos, sin, *projected)
        (y_MD,), low_o_MR = o.forward(mixed_MI, lora_o)
        ctx.parts = rows, norm, heads, qkv, o
        ctx.save_for_backward(x_MD, cos, sin, n_MD, scale_M1, low_MR, mixed_MI, low_o_MR, *lora, *lora_o, *kept)
        return y_MD.add_(x_MD)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, cos, sin, n_MD, scale_M1, low_MR, mixed_MI, low_o_MR, *rest = ctx.saved_tensors
        rows, norm, heads, qkv, o = ctx.parts
        lora, lora_o, kept = rest[:4], rest[4:6], rest[6:]
        grad_mixed, halves_o = o.backward(mixed_MI, low_o_MR, lora_o, [grad_MD], True)
        grads = heads.backward(rows, cos, sin, kept, grad_mixed)
        grad_n, halves = qkv.backward(n_MD, low_MR, lora, grads, ctx.needs_input_grad[0])
        grad_x = None if grad_n is None else norm.backward(x_MD, scale_M1, grad_n, grad_MD)
        return grad_x, None, None, None, None, None, None, None, *halves, *halves_o


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, norm: _Norm, gate_up: _Linears, down: _Linears, *halves: Tensor) -> Tensor:
        lora, lora_down = gate_up.lora(halves[:4]), down.lora(halves[4:])
        n_ND, scale_N1 = norm.forward(x_ND)
        (gate_NF, up_NF), low_NR = gate_up.forward(n_ND, lora)
        opened_NF = functional.silu(gate_NF)
        (y_ND,), low_down_NR = down.forward(opened_NF * up_NF, lora_down)
        ctx.parts = norm, gate_up, down
        ctx.save_for_backward(x_ND, n_ND, scale_N1, low_NR, gate_NF, up_NF, opened_NF, low_down_NR, *lora, *lora_down)
        return y_ND.add_(x_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, n_ND, scale_N1, low_NR, gate_NF, up_NF, opened_NF, low_down_NR, *lora = ctx.saved_tensors
        norm, gate_up, down = ctx.parts
        grad_NF, halves_down = down.backward(opened_NF * up_NF, low_down_NR, lora[3:], [grad_ND], True)
        grad_gate = torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF)
        grad_n, halves = gate_up.backward(n_ND, low_NR, lora[:3], [grad_gate, grad_NF.mul_(opened_NF)], True)
        return norm.backward(x_ND, scale_N1, grad_n, grad_ND), None, None, None, *halves, *halves_down
