"""What the double of Tinker computes: a frozen Llama under LoRA, two losses, AdamW and sampling. It knows no names and no HTTP.

Shape legend
    N  tokens of a datum   K  targets a position, with 2-D targets   V  vocabulary   R  rank   I  in features   O  out features
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from tinker import types
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tensors = dict[str, Tensor]
Reduction = Literal["sum", "mean"]
ALPHA = 32.0  # Tinker's, for every rank
ATTENTION, MLP, UNEMBED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), ("lm_head",)


class BadData(ValueError):
    """The client's data cannot be computed with."""


class Base:
    """The frozen model. One adapter speaks at a time: all calls come from one thread."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module.eval().requires_grad_(False)
        self._speaking: Mapping[str, Tensor] = {}
        self.linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
        for name, layer in self.linears.items():
            layer.register_forward_hook(partial(self._add_lora, name))

    def new_lora(self, config: types.LoraConfig) -> Tensors:
        """A at random, B zero, for the layers that the configuration trains."""
        wanted = (ATTENTION if config.train_attn else ()) + (MLP if config.train_mlp else ()) + (UNEMBED if config.train_unembed else ())
        dice = torch.Generator().manual_seed(random.getrandbits(32) if config.seed is None else config.seed)
        lora: Tensors = {}
        for name, layer in self.linears.items():
            if name.rpartition(".")[2] in wanted:
                a_RI = (torch.rand(config.rank, layer.in_features, generator=dice) * 2 - 1) / math.sqrt(layer.in_features)
                lora |= {f"{name}.lora_A": a_RI, f"{name}.lora_B": torch.zeros(layer.out_features, config.rank)}
        return lora

    def logits(self, lora: Mapping[str, Tensor], tokens: Sequence[int], **cache: Any) -> tuple[Tensor, Any]:
        """Logits_NV in float32 and the cache of keys and values."""
        self._speaking = lora
        try:
            out = self.module(torch.tensor([list(tokens)]), **cache)
        finally:
            self._speaking = {}
        return out.logits[0].float(), out.past_key_values

    def logprobs(self, lora: Mapping[str, Tensor], tokens: Sequence[int]) -> Tensor:
        """Logp_NV: row n is what the model says after token n."""
        if not tokens or max(tokens) >= self.module.config.vocab_size or min(tokens) < 0:
            raise BadData("tokens must be ids of the model's vocabulary, at least one")
        return self.logits(lora, tokens)[0].log_softmax(-1)

    def _add_lora(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        a_RI = self._speaking.get(f"{name}.lora_A")
        if a_RI is None:
            return None
        b_OR = self._speaking[f"{name}.lora_B"]
        return output + (inputs[0].float() @ a_RI.T @ b_OR.T * (ALPHA / a_RI.shape[0])).to(output.dtype)


@dataclass(slots=True)
class Trainee:
    """An adapter in training: its weights, what it has accumulated since the last step, and Adam's state."""

    lora: Tensors
    grads: Tensors = field(default_factory=dict)
    data: int = 0
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    steps: int = 0

    def adam(self, params: types.AdamParams, *, clip: bool, mean: bool) -> float:
        """AdamW as PyTorch has it; returns the norm of the whole gradient before clipping. `mean` divides it by the data seen."""
        grads = {name: self.grads.get(name, torch.zeros_like(p)) / (max(self.data, 1) if mean else 1) for name, p in self.lora.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        if clip and 0 < params.grad_clip_norm < norm:
            grads = {name: g * (params.grad_clip_norm / norm) for name, g in grads.items()}
        self.steps += 1
        for name, g in grads.items():
            m, v = self.moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = params.beta1 * m + (1 - params.beta1) * g, params.beta2 * v + (1 - params.beta2) * g * g
            self.moments[name] = m, v
            m_hat, v_hat = m / (1 - params.beta1**self.steps), v / (1 - params.beta2**self.steps)
            decayed = self.lora[name] * (1 - params.learning_rate * params.weight_decay)
            self.lora[name] = decayed - params.learning_rate * m_hat / (v_hat.sqrt() + params.eps)
        self.grads, self.data = {}, 0
        return norm


def model_pass(
    base: Base, trainee: Trainee, data: Sequence[types.Datum], loss_fn: str, *, reduction: Reduction, backward: bool
) -> tuple[list[dict[str, Tensor]], float]:
    """For each datum logprobs and losses, shaped as its targets, and the whole loss. `backward` adds to the trainee's gradients.

    `reduction` "sum" adds all tokens' losses; "mean" divides each datum's by the sum of its weights, and `adam` then by the data.
    """
    lora = {name: p.detach().requires_grad_(backward) for name, p in trainee.lora.items()}
    outputs, total = [], 0.0
    grads = {name: torch.zeros_like(p) for name, p in lora.items()}
    for datum in data:
        inputs = {name: _dense(value) for name, value in datum.loss_fn_inputs.items()}
        with torch.set_grad_enabled(backward):
            logp, losses = _losses(base.logprobs(lora, datum.model_input.to_ints()), inputs, loss_fn)
            loss = losses.sum()
            if reduction == "mean":
                loss = loss / inputs.get("weights", torch.ones_like(losses)).sum().clamp(min=1e-9)
        if backward:
            found = torch.autograd.grad(loss, list(lora.values()))
            grads = {name: before + g for (name, before), g in zip(grads.items(), found, strict=True)}
        total += float(loss.detach())
        outputs.append({"logprobs": logp.detach(), "elementwise_loss": losses.detach()})
    if backward:
        trainee.grads = {name: trainee.grads.get(name, torch.zeros_like(g)) + g for name, g in grads.items()}
        trainee.data += len(data)
    return outputs, total


def _losses(logp_NV: Tensor, inputs: Mapping[str, Tensor], loss_fn: str) -> tuple[Tensor, Tensor]:
    targets = inputs["target_tokens"].long()
    shapes = {tuple(value.shape) for value in inputs.values()}
    if len(shapes) != 1 or targets.shape[0] != logp_NV.shape[0]:
        raise BadData(f"{logp_NV.shape[0]} tokens with loss_fn_inputs of the shapes {sorted(shapes)}: they must be alike")
    logp = logp_NV.gather(-1, targets if targets.ndim == 2 else targets[:, None]).reshape(targets.shape)
    weights = inputs.get("weights", torch.ones_like(logp))
    if loss_fn == "cross_entropy":
        return logp, -logp * weights
    if targets.ndim == 2:
        raise BadData(f"{loss_fn} takes one target a position")
    return logp, -(logp - inputs["logprobs"]).exp() * inputs["advantages"] * weights


def _dense(tensor: types.TensorData) -> Tensor:
    flat = torch.tensor(tensor.data, dtype=torch.int64 if tensor.dtype == "int64" else torch.float32)
    if tensor.sparse_crow_indices is not None:
        rows, columns = torch.tensor(tensor.sparse_crow_indices), torch.tensor(tensor.sparse_col_indices)
        return torch.sparse_csr_tensor(rows, columns, flat, tensor.shape, check_invariants=True).to_dense()
    return flat.reshape(tensor.shape or [-1])


@dataclass(frozen=True, slots=True)
class Sampled:
    tokens: list[int]
    logprobs: list[float]
    stopped: bool


@torch.no_grad()
def sample(
    base: Base,
    lora: Mapping[str, Tensor],
    prompt: Sequence[int],
    params: types.SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Sampled:
    """One reply. It ends only at what `stop` names, which is part of it, or at `max_tokens`; logprobs are those of temperature 1."""
    dice = torch.Generator().manual_seed(seed)
    logits, cache = base.logits(lora, prompt, use_cache=True)
    tokens: list[int] = []
    logprobs: list[float] = []
    ended = stops_at(params.stop, tokenizer)
    while len(tokens) < (params.max_tokens or 1):
        token = _draw(logits[-1], params, dice)
        logprobs.append(float(logits[-1].log_softmax(-1)[token]))
        tokens.append(token)
        if ended(tokens):
            return Sampled(tokens, logprobs, stopped=True)
        logits, cache = base.logits(lora, [token], past_key_values=cache, use_cache=True)
    return Sampled(tokens, logprobs, stopped=False)


def stops_at(stop: str | Sequence[str] | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], bool]:
    """Whether a reply so far has come to what ends it: a token id, or a string anywhere in its text."""
    wanted = [stop] if isinstance(stop, str) else list(stop or ())
    strings = [s for s in wanted if isinstance(s, str)]
    ids = {s for s in wanted if not isinstance(s, str)}
    return lambda tokens: tokens[-1] in ids or (bool(strings) and any(s in tokenizer.decode(tokens) for s in strings))


def _draw(logits_V: Tensor, params: types.SamplingParams, dice: torch.Generator) -> int:
    if params.temperature == 0:
        return int(logits_V.argmax())
    ordered, order = (logits_V / params.temperature).sort(descending=True)
    p_V = ordered.softmax(-1)
    if params.top_k > 0:
        p_V[params.top_k :] = 0
    p_V[(p_V.cumsum(-1) - p_V) >= params.top_p] = 0
    return int(order[torch.multinomial(p_V, 1, generator=dice)])
