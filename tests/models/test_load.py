"""Loading the base model from a folder: frozen, checked, and refused with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from claas.core.errors import ConfigurationError
from claas.core.settings import Settings
from claas.inference.runner import ModelRunner
from claas.models.load import load_base_model
from tests.models.tiny import tiny_tokenizer


def settings(folder: Path | str, **changes: object) -> Settings:
    return Settings.model_validate({"base_model_id": str(folder), "device": "cpu", "dtype": "float32"} | changes)


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "my-model"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_is_loaded_frozen_and_named_after_it(folder: Path) -> None:
    model = load_base_model(settings(folder))
    assert (model.id, model.dtype, model.device.type, model.max_context) == ("my-model", torch.float32, "cpu", 512)
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert model.n_params == sum(p.numel() for p in model.tree().parameters()) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_the_one_asked_for(folder: Path, dtype: str) -> None:
    model = load_base_model(settings(folder, dtype=dtype))
    assert {p.dtype for p in model.module.parameters()} == {model.dtype} == {getattr(torch, dtype)}


def test_auto_takes_what_the_machine_computes_in(folder: Path) -> None:
    model = load_base_model(settings(folder, dtype="auto", device="auto"))
    assert model.dtype in (torch.bfloat16, torch.float32)
    assert next(model.module.parameters()).device.type == model.device.type


def test_weights_may_stay_in_host_memory_wherever_the_model_is_to_compute(folder: Path) -> None:
    model = load_base_model(settings(folder, device="auto"), on_host=True)
    assert {p.device.type for p in (*model.module.parameters(), *model.module.buffers())} == {"cpu"}
    assert model.device == load_base_model(settings(folder, device="auto")).device


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_trainer_attends_by_the_kernel_asked_for_and_the_server_by_its_own(folder: Path, kernel: str) -> None:
    model = load_base_model(settings(folder, attn_implementation=kernel))
    ModelRunner(model, max_batch=1, max_context=64)
    assert model.tree().config._attn_implementation == kernel


def test_a_kernel_that_cannot_run_here_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="CLAAS_ATTN_IMPLEMENTATION"):
        load_base_model(settings(folder, attn_implementation="flash_attention_2"))


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ConfigurationError, match="CLAAS_DEVICE=auto"):
        load_base_model(settings(folder, device=missing))


def test_a_model_without_chat_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigurationError, match="'my-model' has no chat template"):
        load_base_model(settings(folder))


def test_a_model_with_sliding_windows_is_refused(folder: Path) -> None:
    edit(folder / "config.json", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64)
    with pytest.raises(ConfigurationError, match="sliding_attention"):
        load_base_model(settings(folder))


def test_a_model_whose_logits_are_more_than_its_head_is_refused(folder: Path) -> None:
    edit(folder / "config.json", model_type="cohere", architectures=["CohereForCausalLM"], logit_scale=0.05)
    with pytest.raises(ConfigurationError, match="computes its logits"):
        load_base_model(settings(folder))


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    model = load_base_model(settings(folder)).module
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(ConfigurationError, match="computes its logits"):
        load_base_model(settings(folder))


def test_another_architecture_of_the_same_kind_serves_too(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_base_model(settings(tmp_path)).max_context == 64


@pytest.mark.parametrize("spoil", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_folder_says_what_to_set(folder: Path, spoil: str) -> None:
    (folder / spoil).write_bytes(b"{")
    with pytest.raises(ConfigurationError, match="CLAAS_BASE_MODEL_ID") as raised:
        load_base_model(settings(folder))
    assert str(folder.parent) not in raised.value.message.replace(repr(str(folder)), "")
