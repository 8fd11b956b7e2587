"""A first version fits the model exactly and changes nothing, to the bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from claas.adapters.initialise import DEFAULT_TARGETS, linear_shapes, write_initial_adapter
from claas.adapters.store import CONFIG, WEIGHTS
from claas.core.errors import BadRequest
from tests.adapters.tiny import base_model, configs, logits, read_config, with_adapter

CONFIGS = configs()


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> PretrainedConfig:
    return CONFIGS[str(request.param)]


def _write(
    folder: Path, config: PretrainedConfig, rank: int = 4, targets: tuple[str, ...] | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    write_initial_adapter(folder, config, base_model="me/base", rank=rank, alpha=16, target_modules=targets, seed=seed)
    tensors: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    return tensors


def test_the_shapes_are_those_of_the_real_model(config: PretrainedConfig) -> None:
    model = base_model(config)
    real = {name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert real.pop("lm_head") == (200, 64)
    assert linear_shapes(config) == real
    assert len(real) == 14


def test_peft_loads_it_whole_and_the_output_is_the_same_to_the_bit(config: PretrainedConfig, tmp_path: Path) -> None:
    tensors = _write(tmp_path, config)
    expected = logits(base_model(config))
    model, report = with_adapter(config, tmp_path)
    assert [key for key in report.missing_keys if "lora" in key] == []
    assert report.unexpected_keys == []
    assert torch.equal(logits(model), expected)
    loaded = {name.replace(".default", ""): value for name, value in model.named_parameters() if ".default" in name}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key].to(loaded[key].dtype)) for key in tensors)


def test_peft_itself_would_adapt_the_same_layers_under_the_same_names(config: PretrainedConfig, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    tensors = _write(tmp_path, config)
    theirs = get_peft_model_state_dict(
        get_peft_model(base_model(config), LoraConfig(r=4, lora_alpha=16, target_modules=list(DEFAULT_TARGETS)))
    )
    assert {key: tensor.shape for key, tensor in tensors.items()} == {key: tensor.shape for key, tensor in theirs.items()}


def test_a_is_drawn_as_peft_draws_it_and_b_is_zero(config: PretrainedConfig, tmp_path: Path) -> None:
    for key, tensor in _write(tmp_path, config, rank=64).items():
        assert tensor.dtype == torch.float32
        if "lora_B" in key:
            assert not tensor.any()
        else:  # uniform within ±1/√in: so its standard deviation is the bound / √3
            bound = 1 / math.sqrt(tensor.shape[1])
            assert tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            assert tensor.mean().item() == pytest.approx(0, abs=bound / 20)


def test_the_same_seed_gives_the_same_adapter_and_touches_no_other_randomness(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    state = torch.get_rng_state()
    first, second, third = (_write(folder, CONFIGS["llama"], seed=seed) for folder, seed in zip(folders, (1, 1, 2), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], third[key]) for key in first if "lora_A" in key)


def test_the_models_config_and_torchs_default_are_left_as_they_were(tmp_path: Path) -> None:
    config = LlamaConfig(**CONFIGS["llama-bfloat16"].to_dict())
    before = config.to_dict()
    seen = torch.get_default_dtype()
    _write(tmp_path, config)
    assert config.to_dict() == before
    assert config.dtype == torch.bfloat16
    assert torch.get_default_dtype() == seen


def test_the_config_says_what_was_asked(config: PretrainedConfig, tmp_path: Path) -> None:
    _write(tmp_path, config, rank=3)
    read = read_config(tmp_path)
    assert (read["r"], read["lora_alpha"], read["peft_type"], read["bias"], read["base_model_name_or_path"]) == (
        3,
        16,
        "LORA",
        "none",
        "me/base",
    )
    assert sorted(read["target_modules"]) == sorted(DEFAULT_TARGETS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_only_the_modules_asked_for_are_adapted(tmp_path: Path) -> None:
    tensors = _write(tmp_path, CONFIGS["llama"], targets=("v_proj", "q_proj"))
    assert {key.split(".")[-3] for key in tensors} == {"q_proj", "v_proj"}
    assert len(tensors) == 2 * 2 * 2
    model, report = with_adapter(CONFIGS["llama"], tmp_path)
    assert report.unexpected_keys == []
    assert torch.equal(logits(model), logits(base_model(CONFIGS["llama"])))


@pytest.mark.parametrize("targets", [("q_proj", "c_attn"), ("lm_head",), ("embed_tokens",), (".*",), ("",), ("self_attn",)])
def test_an_unknown_module_is_named_beside_those_there_are(tmp_path: Path, targets: tuple[str, ...]) -> None:
    with pytest.raises(BadRequest, match=r"'down_proj'.*'q_proj'") as caught:
        _write(tmp_path, CONFIGS["llama"], targets=targets)
    assert repr(targets[-1]) in caught.value.message
    assert caught.value.param == "target_modules"
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_the_usual_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="none of the usual layers"):
        _write(tmp_path, GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=100))
