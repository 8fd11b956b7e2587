"""LoRA for serving: PEFT's files in, PEFT's numbers out, each row through its own adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from claas.core.errors import BadRequest, NotFound
from claas.models.base_model import LoadedModel
from claas.models.lora import MAX_PACKS, LoraSwitch, LoraWeights, lora_dtype, read_lora
from tests.models.tiny import load_tiny_model, write_adapter

CPU = torch.device("cpu")
IDS_BT = torch.arange(3, 27).view(4, 6)


def read(folder: Path, name: str = "a") -> LoraWeights:
    return read_lora(folder, name, device=CPU, dtype=torch.float32)


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(input_ids=IDS_BT).logits
    return out


@pytest.mark.parametrize("rslora", [False, True])
def test_a_saved_adapter_computes_what_peft_does(tiny_model: LoadedModel, tmp_path: Path, rslora: bool) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=rslora, task_type="CAUSAL_LM", init_lora_weights=False)
    peft = get_peft_model(tiny_model.tree(), config).eval()
    peft.save_pretrained(str(tmp_path))
    tree = tiny_model.tree()
    switch = LoraSwitch(tree)
    weights = read(tmp_path)
    switch.check(weights)
    switch.use([weights] * 4, 6)
    torch.testing.assert_close(logits(tree), logits(peft), atol=1e-4, rtol=1e-4)


def test_each_row_speaks_through_its_own_adapter(tiny_model: LoadedModel, tmp_path: Path) -> None:
    shapes: list[dict[str, Any]] = [{"rank": 3}, {"rank": 5, "targets": ["k_proj", "up_proj"]}]
    folders = [write_adapter(tmp_path / str(i), tiny_model, seed=i, **shape) for i, shape in enumerate(shapes)]
    one, two = (read(folder, name) for folder, name in zip(folders, ("one", "two"), strict=True))
    tree = tiny_model.tree()
    switch = LoraSwitch(tree)
    switch.use([two, None, one, two], 6)
    mixed = logits(tree)
    peft_one, peft_two = (logits(PeftModel.from_pretrained(tiny_model.tree(), str(folder))) for folder in folders)
    expected = torch.stack([peft_two[0], logits(tiny_model.module)[1], peft_one[2], peft_two[3]])
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)


def test_laying_adapters_down_gives_the_base_back_to_the_bit(tiny_model: LoadedModel, tmp_path: Path) -> None:
    weights = read(write_adapter(tmp_path, tiny_model, seed=1))
    tree = tiny_model.tree()
    switch = LoraSwitch(tree)
    switch.use([weights] * 4, 6)
    assert not torch.equal(logits(tree), logits(tiny_model.module))
    switch.use([None] * 4, 6)
    assert torch.equal(logits(tree), logits(tiny_model.module))


def test_the_trees_share_their_weights_and_not_their_adapters(tiny_model: LoadedModel, tmp_path: Path) -> None:
    weights = read(write_adapter(tmp_path, tiny_model, seed=1))
    before = logits(tiny_model.module)
    tree = tiny_model.tree()
    LoraSwitch(tree).use([weights] * 4, 6)
    assert torch.equal(logits(tiny_model.module), before)
    base = dict(tiny_model.module.named_parameters())
    assert all(parameter.data_ptr() == base[name].data_ptr() for name, parameter in tree.named_parameters())


def test_bfloat16_models_take_float32_adapters_on_a_cpu(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert lora_dtype(CPU, torch.bfloat16) == torch.float32
    assert lora_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16
    model = load_tiny_model(tiny_model_dir)  # its own, since trees share what `to` changes
    folder = write_adapter(tmp_path, model, seed=1)
    model.module.to(torch.bfloat16)
    tree, other = model.tree(), model.tree()
    switch = LoraSwitch(tree)
    switch.use([read(folder)] * 4, 6)
    torch.testing.assert_close(logits(tree), logits(PeftModel.from_pretrained(other, str(folder))), atol=0.1, rtol=0.05)


def test_old_packs_are_let_go(tiny_model: LoadedModel, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, tiny_model, seed=1, targets=["q_proj"])
    switch = LoraSwitch(tiny_model.tree())
    for i in range(3 * MAX_PACKS):
        switch.use([read(folder, str(i)), read(folder, f"{i}'")], 1)
    assert len(switch._packs) == MAX_PACKS


def test_files_that_are_gone_or_damaged_say_so(tiny_model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="gone"):
        read(tmp_path)
    write_adapter(tmp_path, tiny_model, seed=1)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(BadRequest, match="damaged"):
        read(tmp_path)


@pytest.mark.parametrize("change", [{"peft_type": "IA3"}, {"alpha_pattern": {"q_proj": 2}}])
def test_other_kinds_of_adapters_are_refused(tiny_model: LoadedModel, tmp_path: Path, change: dict[str, Any]) -> None:
    write_adapter(tmp_path, tiny_model, seed=1)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(BadRequest, match="plain LoRA"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", (64,)),
        ("base_model.model.lm_head.weight", (8, 8)),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", (4, 64)),
    ],
)
def test_tensors_that_are_no_pair_of_lora_matrices_are_refused(
    tiny_model: LoadedModel, tmp_path: Path, key: str, shape: tuple[int, ...]
) -> None:
    weights = write_adapter(tmp_path, tiny_model, seed=1) / "adapter_model.safetensors"
    save_file(load_file(weights) | {key: torch.ones(shape)}, weights)
    with pytest.raises(BadRequest, match=r"cannot be served|belong together"):
        read(tmp_path)


def test_an_adapter_of_another_shape_is_refused(tiny_model: LoadedModel, tmp_path: Path) -> None:
    weights = read(write_adapter(tmp_path, tiny_model, seed=1))
    name, (a_IR, b_RO) = next(iter(weights.layers.items()))
    switch = LoraSwitch(tiny_model.tree())
    for layers in ({"model.layers.7.mlp.up_proj": (a_IR, b_RO)}, {name: (a_IR[:-1], b_RO)}, {name: (a_IR, b_RO[:, :-1])}):
        with pytest.raises(BadRequest, match="does not fit the base model"):
            switch.check(LoraWeights("other", layers))


def test_weights_that_overflow_with_their_scaling_are_refused(tiny_model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="too large to compute with"):
        read(write_adapter(tmp_path, tiny_model, seed=1, alpha=10_000, scale=1e37))
