"""The hand-written Llama layer against transformers' own: the same outputs and gradients, with and without LoRA, checkpointed or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from claas.adapters.initialise import write_initial_adapter
from claas.models.base_model import LoadedModel
from claas.training.batch import collate
from claas.training.fused import QUERIES, FusedLlamaLayer, fuse
from claas.training.policy import Policy
from tests.training.conftest import ids, tiny_llama, unfuse


def pair(folder: Path, dtype: torch.dtype, *, targets: tuple[str, ...] | None = None, bias: bool = False) -> tuple[Policy, Policy]:
    """Fused and plain, with the same random adapter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.2, attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)
    model = LoadedModel("tiny", "tiny", config, None, module, torch.device("cpu"), dtype)
    write_initial_adapter(folder, config, base_model="tiny", rank=4, alpha=8, target_modules=targets)
    fused, plain = Policy(model, folder), Policy(model, folder)
    unfuse(plain)
    with torch.no_grad():
        for name, parameter in fused.parameters.items():
            plain.parameters[name].copy_(parameter.normal_(std=0.2))
    return fused, plain


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())


@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj", "up_proj")])
@pytest.mark.parametrize("longest", [9, QUERIES, 2 * QUERIES + 3])
@pytest.mark.parametrize("shared", [0, 1, 7, QUERIES + 5])
def test_it_computes_what_the_plain_layers_do(tmp_path: Path, targets: tuple[str, ...] | None, longest: int, shared: int) -> None:
    fused, plain = pair(tmp_path, torch.float32, targets=targets, bias=targets is None)
    tolerance = 1e-5
    common = ids(5, shared)
    sequences = collate([(*common, *ids(1, 3)), (*common, *ids(2, 4))], [ids(3, longest - 3), ids(4, 5)])
    assert len(sequences.shared_P) == shared
    ours_ND, theirs_ND = fused.hidden(sequences), plain.hidden(sequences)
    weight_ND = torch.randn_like(ours_ND)
    (ours_ND * weight_ND).sum().backward()
    (theirs_ND * weight_ND).sum().backward()
    assert relative(ours_ND, theirs_ND) < tolerance
    for name, parameter in fused.parameters.items():
        expected = plain.parameters[name].grad
        assert parameter.grad is not None and expected is not None
        assert relative(parameter.grad, expected) < tolerance, name
    with torch.no_grad():
        base_ND = fused.hidden(sequences, speaker="base")
        assert relative(base_ND, plain.hidden(sequences, speaker="base")) < tolerance
    assert relative(base_ND, ours_ND) > 0.01


def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_plain_layer(tmp_path: Path) -> None:
    """Mean over batches, of outputs and of gradients: the truth is the plain layer in float32 with the same, rounded weights."""
    rounded = pair(tmp_path, torch.bfloat16)
    truth = pair(tmp_path, torch.bfloat16)[1]
    truth._peft.get_base_model().float()
    for name, parameter in rounded[0].parameters.items():
        truth.parameters[name].data.copy_(parameter)
    errors: dict[str, list[float]] = {"fused": [], "plain": []}
    for seed in range(8):
        sequences = collate([ids(seed, 8), ids(seed + 50, 20)], [ids(seed + 100, 90), ids(seed + 150, 40)])
        weight_ND = torch.randn(130, 32, generator=torch.Generator().manual_seed(seed))
        seen = {}
        for which, policy in (("fused", rounded[0]), ("plain", rounded[1]), ("truth", truth)):
            out_ND = policy.hidden(sequences)
            policy._peft.zero_grad()
            (out_ND.float() * weight_ND).sum().backward()
            grads = [p.grad.flatten() for p in policy.parameters.values() if p.grad is not None]
            assert len(grads) == len(policy.parameters)
            seen[which] = (out_ND, torch.cat(grads))
        for which, found in errors.items():
            found += [relative(mine, true) for mine, true in zip(seen[which], seen["truth"], strict=True)]
    mean = {which: sum(found) / len(found) for which, found in errors.items()}
    assert 0 < mean["fused"] < 1.1 * mean["plain"], mean


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    whole, again = pair(tmp_path, torch.float32)[0], pair(tmp_path, torch.float32)[0]
    again._peft.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    again._peft.train()
    sequences = collate([ids(1, 5)], [ids(2, 6)])
    for policy in (whole, again):
        policy.hidden(sequences).square().sum().backward()
    for name, parameter in whole.parameters.items():
        assert parameter.grad is not None and parameter.grad.any()
        assert torch.equal(parameter.grad, again.parameters[name].grad), name  # type: ignore[arg-type]


def test_a_decoder_with_a_layer_of_its_own_is_left_alone() -> None:
    class Other(LlamaDecoderLayer):  # type: ignore[misc]
        pass

    decoder = tiny_llama().module.model
    decoder.layers[1].__class__ = Other
    fuse(decoder)
    assert [type(layer) for layer in decoder.layers] == [LlamaDecoderLayer, Other] and type(decoder) is LlamaModel
    decoder.layers[1].__class__ = LlamaDecoderLayer
    fuse(decoder)
    assert [type(layer) for layer in decoder.layers] == [FusedLlamaLayer] * 2
