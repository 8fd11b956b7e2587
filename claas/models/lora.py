"""LoRA for serving: adapter versions in memory, and a module tree whose rows may each speak through another version in one batch.

Shape legend
    I  in features   O  out features   R  ranks of all packed adapters, side by side   B  batch rows   T  tokens a row   N  B·T

A layer computes `base(x) + mask ⊙ (x·A_IR) · B_RO`: the A and B of every adapter in the batch lie side by side, and the mask leaves
each row its own ranks. With one adapter for all rows there is no mask; with none there is no extra work.

It does not know who asks for which version, nor how adapters are trained or stored beyond PEFT's two files.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from claas.adapters.store import CONFIG, WEIGHTS
from claas.core.errors import BadRequest, NotFound

MAX_PACKS = 2
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """One adapter version: for each layer it changes, A_IR and B_RO with the scaling in B. Immutable; compared by identity."""

    name: str
    layers: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(half.nbytes for halves in self.layers.values() for half in halves)


def lora_dtype(device: torch.device, model_dtype: torch.dtype) -> torch.dtype:
    """Float32 on a CPU, where products of this size are several times faster in it than in bfloat16; elsewhere the model's."""
    return torch.float32 if device.type == "cpu" else model_dtype


def read_lora(folder: Path, name: str, *, device: torch.device, dtype: torch.dtype) -> LoraWeights:
    """Read PEFT's `adapter_config.json` and `adapter_model.safetensors`. Layers whose B is zero are left out: they change nothing.

    Raises:
        NotFound: the files are gone.
        BadRequest: they hold anything but plain LoRA matrices.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = read_tensors(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise NotFound(f"the files of adapter version {name!r} are gone", param="model") from error
    except (ValueError, SafetensorError) as error:
        raise BadRequest(f"the files of adapter version {name!r} cannot be read: they are damaged", param="model") from error
    halves = _halves(tensors, name)
    if config.get("peft_type") != "LORA" or config.get("alpha_pattern"):
        raise BadRequest(f"adapter version {name!r} is not plain LoRA with one alpha, so it cannot be served", param="model")
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, (a_RI, b_OR) in halves.items():
        if not b_OR.any():
            continue
        rank = a_RI.shape[0]
        scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        a_IR = a_RI.t().to(device, dtype).contiguous()
        b_RO = (b_OR.float() * scaling).t().to(device, dtype).contiguous()
        if not (a_IR.isfinite().all() and b_RO.isfinite().all()):
            raise BadRequest(f"adapter version {name!r} has weights too large to compute with, so it cannot be served", param="model")
        layers[layer] = (a_IR, b_RO)
    return LoraWeights(name, layers)


def _halves(tensors: Mapping[str, Tensor], name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer. Raises BadRequest for a key that is neither, and for a half without the other."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise BadRequest(
                f"adapter version {name!r} holds {key[:200]!r}, which is not a LoRA matrix, so it cannot be served", param="model"
            )
        found.setdefault(match["layer"], {})[match["half"]] = tensor
    for layer, halves in found.items():
        if len(halves) != 2 or halves["A"].shape[0] != halves["B"].shape[1]:
            raise BadRequest(f"adapter version {name!r}: the LoRA matrices of layer {layer[:200]!r} do not belong together", param="model")
    return {layer: (halves["A"], halves["B"]) for layer, halves in found.items()}


class LoraSwitch:
    """Turns the linear layers of a tree into layers that can carry adapters, and says before each forward which rows carry which."""

    def __init__(self, tree: PreTrainedModel) -> None:
        head = tree.get_output_embeddings()
        linears = {name: m for name, m in tree.named_modules() if isinstance(m, nn.Linear) and m is not head}
        self._layers = {name: LoraLinear(linear) for name, linear in linears.items()}
        for name, layer in self._layers.items():
            parent, _, child = name.rpartition(".")
            setattr(tree.get_submodule(parent), child, layer)
        self._packs: OrderedDict[tuple[LoraWeights, ...], dict[str, _Pack]] = OrderedDict()
        self._used: tuple[tuple[LoraWeights | None, ...], int] = ((), 0)

    def check(self, weights: LoraWeights) -> None:
        """Raises BadRequest if the adapter is for another model."""
        for name, (a_IR, b_RO) in weights.layers.items():
            layer = self._layers.get(name)
            if layer is None or (a_IR.shape[0], b_RO.shape[1]) != (layer.in_features, layer.out_features):
                raise BadRequest(
                    f"adapter version {weights.name!r} does not fit the base model: layer {name[:200]!r} differs", param="model"
                )

    def use(self, rows: Sequence[LoraWeights | None], n_tokens: int) -> None:
        """From now on a forward has these rows (None: plain base) of `n_tokens` tokens each."""
        wanted = (tuple(rows), n_tokens)
        if wanted == self._used:
            return
        active = tuple(sorted({w for w in rows if w is not None and w.layers}, key=lambda w: w.name))
        packs = self._pack(active)
        mixed = len(active) > 1 or (len(active) == 1 and any(w is not active[0] for w in rows))
        masks: dict[tuple[int, ...], Tensor] = {}
        for name, layer in self._layers.items():
            pack = packs.get(name)
            if pack is not None and mixed and pack.ranks not in masks:
                masks[pack.ranks] = _mask(rows, active, pack, n_tokens)
            layer.carry(pack, masks.get(pack.ranks) if pack else None)
        self._used = wanted

    def _pack(self, active: tuple[LoraWeights, ...]) -> dict[str, _Pack]:
        """The adapters' matrices side by side, layer by layer. The last two are kept: prefill and decoding take turns."""
        if active in self._packs:
            self._packs.move_to_end(active)
            return self._packs[active]
        packs = {}
        for name in dict.fromkeys(name for weights in active for name in weights.layers):
            pairs = [weights.layers.get(name) for weights in active]
            a_IR = _side_by_side([pair[0] for pair in pairs if pair], dim=1)
            b_RO = _side_by_side([pair[1] for pair in pairs if pair], dim=0)
            packs[name] = _Pack(a_IR, b_RO, tuple(p[0].shape[1] if p else 0 for p in pairs))
        self._packs[active] = packs
        if len(self._packs) > MAX_PACKS:
            self._packs.popitem(last=False)
        return packs


@dataclass(frozen=True, slots=True)
class _Pack:
    """One layer's matrices of several adapters, side by side. `ranks`: how many columns each adapter has."""

    a_IR: Tensor
    b_RO: Tensor
    ranks: tuple[int, ...]


def _side_by_side(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _mask(rows: Sequence[LoraWeights | None], active: Sequence[LoraWeights], pack: _Pack, n_tokens: int) -> Tensor:
    """(N, R): whether a column belongs to an adapter that a token's row does not carry."""
    place = {weights: i for i, weights in enumerate(active)}
    carried_B = torch.tensor([-1 if w is None else place.get(w, -1) for w in rows])
    owner_R = torch.repeat_interleave(torch.arange(len(active)), torch.tensor(pack.ranks))
    return (carried_B.repeat_interleave(n_tokens)[:, None] != owner_R[None]).to(pack.a_IR.device)


class LoraLinear(nn.Linear):
    """A linear layer over another's weights, plus what it carries at present."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self._pack: _Pack | None = None
        self._mask_NR: Tensor | None = None

    def carry(self, pack: _Pack | None, mask_NR: Tensor | None) -> None:
        """Take up adapters for the forwards to come, or lay them down."""
        # Past nn.Module's own attribute setter, which is slow and has nothing to do here.
        self.__dict__["_pack"] = pack
        self.__dict__["_mask_NR"] = mask_NR

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, T, I) → (B, T, O)."""
        y = functional.linear(x, self.weight, self.bias)
        pack = self._pack
        if pack is None:
            return y
        h_NR = x.reshape(-1, self.in_features).to(pack.a_IR.dtype).mm(pack.a_IR)
        if self._mask_NR is not None:
            h_NR.masked_fill_(self._mask_NR, 0.0)  # not a product: another's huge matrix may have made infinity of it
        y_NO = y.view(-1, self.out_features)
        if y.dtype == pack.b_RO.dtype:
            y_NO.addmm_(h_NR, pack.b_RO)
        else:
            y_NO.add_(h_NR.mm(pack.b_RO))
        return y


def read_tensors(file: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A safetensors file's tensors, none of which keeps the file open: a Volume of Modal's could not be reloaded then."""
    return {name: tensor.to(device) for name, tensor in load(file.read_bytes()).items()}
