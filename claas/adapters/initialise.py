"""LoRA adapters from the base model's config alone: which layers can carry one, and a first version of no effect.

Reads no weights: the model is built on torch's meta device, so an 8B model takes no memory. Imports torch; nothing above may import
this file where torch is not wanted.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from peft import LoraConfig, TaskType
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from claas.adapters.store import WEIGHTS
from claas.core.errors import BadRequest

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KEY_PREFIX = "base_model.model."


def linear_shapes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """(out, in) features of every linear layer that can carry an adapter, by its name in the model, in the model's order.

    The head that makes logits is left out: its weights are often the embedding's too.
    """
    # A copy, and the default dtype: from_config writes into the config, and would change torch's default under other threads.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.get_default_dtype())
    head = model.get_output_embeddings()
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def write_initial_adapter(
    folder: Path,
    config: PretrainedConfig,
    *,
    base_model: str,
    rank: int,
    alpha: int,
    target_modules: tuple[str, ...] | None,
    seed: int = 0,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` of an adapter that changes nothing yet: A random, B zero, float32.

    A is drawn as PEFT does (Kaiming-uniform, a = √5), the same for the same seed. `target_modules` None: the attention and MLP
    projections of Llama- and Qwen-like models.

    Raises BadRequest, naming the layers there are, for target modules that the model does not have.
    """
    shapes = linear_shapes(config)
    targets = _targets(tuple(shapes), target_modules)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (out_features, in_features) in shapes.items():
        if name.rpartition(".")[2] in targets:
            a = torch.empty(rank, in_features, dtype=torch.float32)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = a
            tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = torch.zeros(out_features, rank, dtype=torch.float32)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).save_pretrained(str(folder))


def _targets(layers: tuple[str, ...], wanted: tuple[str, ...] | None) -> list[str]:
    """The last name parts of the layers to adapt, sorted."""
    there = {name.rpartition(".")[2] for name in layers}
    targets = sorted(there.intersection(DEFAULT_TARGETS) if wanted is None else set(wanted))
    unknown = [name for name in targets if name not in there]
    if unknown or not targets:
        what = f"has no layers named {', '.join(map(repr, unknown))}" if unknown else "has none of the usual layers"
        raise BadRequest(f"the base model {what}: target_modules may name {', '.join(map(repr, sorted(there)))}", param="target_modules")
    return targets
