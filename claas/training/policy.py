"""The trainable policy: a module tree over the shared base weights with one PEFT adapter, and its optimizer's moments.

Base weights are frozen and shared with whoever serves; only the adapter's float32 matrices belong to this object.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from claas.adapters.store import OPTIMIZER
from claas.models.base_model import LoadedModel
from claas.models.lora import read_tensors
from claas.training.batch import Sequences
from claas.training.fused import FusedLlamaModel, fuse
from claas.training.lora import LoraLinear
from claas.training.memory import checkpointed
from claas.training.samples import MICRO_BATCH_TOKENS, Speaker
from claas.training.teachers import Adapter, Teacher, TeacherMemory, in_float64

ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-6


class Policy:
    """Base model plus one adapter version, ready to be trained on samples of up to `tokens`. The base's weights are on its device."""

    def __init__(self, base: LoadedModel, folder: Path, tokens: int = MICRO_BATCH_TOKENS) -> None:
        self.device = base.device
        config = LoraConfig.from_pretrained(str(folder))
        config._register_custom_module({nn.Linear: LoraLinear})
        self._peft = PeftModel.from_pretrained(base.tree(), str(folder), config=config, is_trainable=True, torch_device=str(base.device))
        causal_lm = self._peft.get_base_model()
        if base.device.type == "cpu":
            fuse(causal_lm.get_decoder())
        self._backbone: nn.Module = causal_lm.get_decoder()
        self._head: nn.Module = causal_lm.get_output_embeddings()
        self.teachers: dict[TeacherMemory, Teacher] = {}
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in sorted(self._peft.named_parameters()) if p.requires_grad}
        twice = checkpointed(base, tokens)
        if twice:
            causal_lm.activation_checkpointing_enable({"use_reentrant": False})
        # transformers computes layers again in training mode only.
        self._peft.train(twice)

    def hidden(self, sequences: Sequences, *, speaker: Speaker = "live") -> Tensor:
        """Final hidden states at the positions that predict a response token, (N, D). `live` is the adapter that is trained."""
        batch = sequences.to(self.device)
        if speaker == "live":
            return self._through_backbone(batch, {})
        if speaker == "base":
            with self._peft.disable_adapter():
                return self._through_backbone(batch, {})
        return self._through_backbone(batch, self._in_backbone(self.teachers[speaker].weights))

    def _through_backbone(self, batch: Sequences, worn: dict[str, Tensor]) -> Tensor:
        """(N, D), with these matrices in place of the adapter's own."""
        if isinstance(self._backbone, FusedLlamaModel):
            fused_ND: Tensor = functional_call(self._backbone, worn, (batch.shared_P, batch.own_BS, batch.predict_N))
            return fused_ND
        out_BLD: Tensor = functional_call(self._backbone, worn, (), {"input_ids": batch.whole(), "use_cache": False}).last_hidden_state
        return out_BLD[:, len(batch.shared_P) :].flatten(0, 1)[batch.predict_N]

    @property
    def shares_prompts(self) -> bool:
        """Whether what all sequences of a micro-batch begin with is computed once."""
        return isinstance(self._backbone, FusedLlamaModel)

    def positions(self, sequences: Sequences) -> int:
        """How many positions a forward computes."""
        times = 1 if self.shares_prompts else len(sequences.own_BS)
        return times * len(sequences.shared_P) + sequences.own_BS.numel()

    def _in_backbone(self, adapter: Adapter) -> dict[str, Tensor]:
        """An adapter's matrices by their names in the decoder."""
        ours = {id(parameter): name for name, parameter in self.parameters.items()}
        return {name: adapter[ours[id(p)]] for name, p in self._backbone.named_parameters() if id(p) in ours}

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The LM head on a chunk of positions, (N, V) in the model's dtype."""
        logits_NV: Tensor = self._head(hidden_ND)
        return logits_NV

    def optimizer(self, folder: Path, learning_rate: float) -> torch.optim.AdamW:
        """AdamW with the moments stored beside the version, if it has any. The learning rate is always the one asked for."""
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=learning_rate, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=0.0)
        file = folder / OPTIMIZER
        if file.is_file():
            stored = read_tensors(file, device=str(self.device))
            for name, parameter in self.parameters.items():
                optimizer.state[parameter] = {
                    "step": stored[f"{name}.step"].cpu(),
                    "exp_avg": stored[f"{name}.exp_avg"],
                    "exp_avg_sq": stored[f"{name}.exp_avg_sq"],
                }
        return optimizer

    def save(self, folder: Path, optimizer: torch.optim.AdamW) -> None:
        """Write adapter and moments, float32, in safetensors."""
        # Embeddings are never trained here; left to find out for itself, PEFT would ask the hub.
        self._peft.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        moments = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, parameter in self.parameters.items()
            for key, value in optimizer.state[parameter].items()
        }
        save_file(moments, folder / OPTIMIZER)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the adapter, for undoing and for measuring how far it moved."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Take the adapter back to a snapshot."""
        for name, parameter in self.parameters.items():
            parameter.copy_(snapshot[name])

    def relative_change(self, before: dict[str, Tensor]) -> float | None:
        """‖Δ(BA)‖ / ‖BA‖ over all modules, without ever forming BA; None when the adapter was zero before."""
        change = size = 0.0
        for name, a_old in before.items():
            if ".lora_A." not in name:
                continue
            b_name = name.replace(".lora_A.", ".lora_B.")
            b_old, a_new, b_new = before[b_name], self.parameters[name].detach(), self.parameters[b_name].detach()
            change += _product_norm_sq(torch.cat([b_new, -b_old], dim=1), torch.cat([a_new, a_old], dim=0))
            size += _product_norm_sq(b_old, a_old)
        return (max(change, 0.0) / size) ** 0.5 if size > 0 else None


def _product_norm_sq(b_OR: Tensor, a_RI: Tensor) -> float:
    """‖BA‖²_F = Σ (BᵀB) ∘ (AAᵀ), from two (R, R) products, in float64 since it is a difference of near equals."""
    b, a = in_float64(b_OR), in_float64(a_RI)
    return float(((b.T @ b) * (a @ a.T)).sum())
