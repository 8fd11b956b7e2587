"""The loaded base model. Trainer and server each get a module tree of their own over the same weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class BaseModel(Protocol):
    """What must be known of a base model to keep adapters of it: its name, shape and size."""

    @property
    def id(self) -> str: ...

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def n_params(self) -> int: ...


@dataclass(frozen=True, slots=True)
class DescribedModel:
    """A base model whose weights are elsewhere, with its tokenizer."""

    id: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    n_params: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Frozen base weights in memory, once, with their tokenizer.

    `id` is what requests call the base model; `path` is a hub id or a folder that `from_pretrained` takes. `device` is where it computes:
    the weights are there, or come there for each step.
    """

    id: str
    path: str | Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    module: PreTrainedModel
    device: torch.device
    dtype: torch.dtype

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def max_context(self) -> int:
        return int(self.config.max_position_embeddings)

    def tree(self) -> PreTrainedModel:
        """Another module tree over the same parameters and buffers: adapters put on one tree do not show in the other."""
        shared: dict[int, nn.Parameter | torch.Tensor] = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        return copy.deepcopy(self.module, shared)
