"""Tiny random models of the families that adapters are made for, and adapters that do have an effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from claas.adapters.initialise import write_initial_adapter
from claas.adapters.store import CONFIG, WEIGHTS

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def configs() -> dict[str, PretrainedConfig]:
    """One config for each family; Qwen3's heads are wider than hidden_size / heads, as in the real 0.6B."""
    return {
        "llama": LlamaConfig(**_SIZES),
        "llama-untied": LlamaConfig(**_SIZES | {"tie_word_embeddings": False}),
        "llama-bfloat16": LlamaConfig(**_SIZES, dtype="bfloat16"),
        "qwen2": Qwen2Config(**_SIZES),
        "qwen3": Qwen3Config(**_SIZES, head_dim=32),
    }


def base_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def with_adapter(config: PretrainedConfig, folder: Path) -> tuple[PeftModel, Any]:
    """The base model with the adapter of `folder`, and PEFT's report of what it loaded."""
    model = PeftModel.from_pretrained(base_model(config), str(folder))
    report = model.load_adapter(str(folder), adapter_name="again")
    return model, report


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(PROMPT).logits
    return out


def taught_adapter(
    folder: Path, config: PretrainedConfig, *, rank: int = 4, targets: tuple[str, ...] | None = None
) -> dict[str, torch.Tensor]:
    """An adapter with random B, so that it changes what the model says; its tensors."""
    write_initial_adapter(folder, config, base_model="me/base", rank=rank, alpha=2 * rank, target_modules=targets)
    torch.manual_seed(2)
    tensors = {key: torch.randn_like(tensor) * 0.1 if "lora_B" in key else tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return read


def write_config(folder: Path, changes: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(read_config(folder) | changes))
