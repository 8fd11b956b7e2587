"""A tiny random Llama with a zero-effect adapter, and samples for it: no tokenizer, no download, milliseconds a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from claas.adapters.initialise import write_initial_adapter
from claas.models.base_model import LoadedModel
from claas.training.policy import Policy
from claas.training.samples import Sample

VOCAB = 300


def tiny_llama(seed: int = 0, vocab: int = VOCAB) -> LoadedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LoadedModel("tiny", "tiny", config, None, module, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def base() -> LoadedModel:
    return tiny_llama()


@pytest.fixture
def folder(base: LoadedModel, tmp_path: Path) -> Path:
    """Version 0 of an adapter."""
    write_initial_adapter(tmp_path, base.config, base_model="tiny", rank=4, alpha=8, target_modules=None)
    return tmp_path


@pytest.fixture
def policy(base: LoadedModel, folder: Path) -> Policy:
    return Policy(base, folder)


def unfuse(policy: Policy) -> None:
    """Let the policy compute with transformers' own Llama layers, as on a GPU."""
    for module in policy._peft.modules():
        for plain in (LlamaModel, LlamaDecoderLayer):
            if isinstance(module, plain):
                module.__class__ = plain


def ids(seed: int, n: int) -> tuple[int, ...]:
    return tuple(torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def sample(seed: int = 0, *, prompt: int = 6, response: int = 5, **changes: object) -> Sample:
    """A sample whose teacher reads four tokens more than the student."""
    student = ids(seed, prompt)
    fields: dict[str, object] = {
        "source": "sampled",
        "teacher": "base",
        "student_prompt": student,
        "teacher_prompt": student + ids(seed + 1000, 4),
        "control_prompt": None,
        "response": ids(seed + 2000, response),
        "served_logp": (),
        "on_policy": True,
        "age": 0,
    }
    fields |= changes
    fields["served_logp"] = fields["served_logp"] or (-1.0,) * len(fields["response"])  # type: ignore[arg-type]
    return Sample(**fields)  # type: ignore[arg-type]


@pytest.fixture
def nothing() -> Callable[[], None]:
    return lambda: None
