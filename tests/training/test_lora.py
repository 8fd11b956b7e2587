"""The trainer's LoRA layer against PEFT's own: the same outputs, the same gradients, the same switch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from claas.adapters.initialise import write_initial_adapter
from claas.models.base_model import LoadedModel
from claas.training.batch import collate
from claas.training.lora import LoraLinear
from claas.training.policy import Policy
from tests.training.conftest import ids, tiny_llama


class PlainLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Computes module by module on every device: only the very class that it extends is fused."""


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_it_computes_what_peft_does(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    own = tiny_llama()
    for layer in own.module.model.layers:
        layer.__class__ = PlainLayer
    model = LoadedModel("tiny", "tiny", own.config, own.tokenizer, own.module.to(dtype), own.device, dtype)
    write_initial_adapter(tmp_path, model.config, base_model="tiny", rank=4, alpha=8, target_modules=None)
    policy = Policy(model, tmp_path)
    peft = PeftModel.from_pretrained(model.tree(), str(tmp_path), is_trainable=True).eval()
    theirs = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            theirs[name].copy_(parameter)
    assert sum(isinstance(module, LoraLinear) for module in policy._peft.modules()) == 2 * 7
    sequences = collate([ids(1, 5), ids(2, 9)], [ids(3, 7), ids(4, 3)])

    def hidden(model: PeftModel) -> Tensor:
        out: Tensor = model.get_base_model().get_decoder()(input_ids=sequences.whole()).last_hidden_state
        return out[:, len(sequences.shared_P) :].flatten(0, 1)[sequences.predict_N]

    ours_ND, theirs_ND = policy.hidden(sequences), hidden(peft)
    weight_ND = torch.randn(ours_ND.shape, generator=generator).to(dtype)
    (ours_ND * weight_ND).sum().backward()
    (theirs_ND * weight_ND).sum().backward()
    assert ours_ND.dtype == dtype
    assert relative(ours_ND, theirs_ND) < tolerance
    for name, parameter in policy.parameters.items():
        ours, expected = parameter.grad, theirs[name].grad
        assert ours is not None and expected is not None
        assert ours.dtype == torch.float32
        assert relative(ours, expected) < tolerance, name
    with torch.no_grad(), peft.disable_adapter():
        assert torch.equal(policy.hidden(sequences, speaker="base"), hidden(peft))
        assert relative(policy.hidden(sequences, speaker="base"), ours_ND) > 0.01
