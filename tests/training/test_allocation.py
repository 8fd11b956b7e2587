"""No float32 tensor of a whole reply by the vocabulary is ever made in a lesson: every operation's output is watched, backward included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from claas.adapters.initialise import write_initial_adapter
from claas.core.types import TrainingConfig
from claas.models.base_model import LoadedModel
from claas.training.micro_batch import CHUNK
from claas.training.policy import Policy
from claas.training.sdpo import ROWS
from claas.training.step import LessonStep
from tests.training.conftest import sample, tiny_llama

REPLY = CHUNK + 72
"""T: longer than a chunk."""
VOCAB = 4096
"""V: so many that a chunk of rows is larger than all else that the tiny model computes."""


class Largest(TorchDispatchMode):
    """The most elements that a float32 output of any operation had, whatever its shape."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["sampled", "hindsight"])
def test_no_float32_tensor_of_a_reply_by_the_vocabulary(tmp_path: Path, dtype: torch.dtype, source: str) -> None:
    own = tiny_llama(vocab=VOCAB)
    model = LoadedModel("tiny", "tiny", own.config, own.tokenizer, own.module.to(dtype), own.device, dtype)
    write_initial_adapter(tmp_path, model.config, base_model="tiny", rank=4, alpha=8, target_modules=None)
    policy = Policy(model, tmp_path)
    config = TrainingConfig(learning_rate=1e-2, teacher_top_k=20, max_kl=100.0, min_signal=0.0, kl_reg_weight=0.1, gradient_steps=2)
    prompt = sample(9).teacher_prompt
    samples = [sample(n, response=REPLY, source=source, control_prompt=prompt) for n in range(2)]
    with Largest() as seen:
        result = LessonStep(policy, policy.optimizer(tmp_path, config.learning_rate), config, samples, lambda: None).run()
    assert result.after is not None and len(result.grad_norms) == 2, "the whole step ran"
    assert ROWS * VOCAB <= seen.elements <= CHUNK * VOCAB, "blocks of rows were made, and no more than a chunk"


def test_the_watcher_sees_one_that_is_made() -> None:
    hidden_TD = torch.randn(REPLY, 8, requires_grad=True)
    with Largest() as seen:
        (hidden_TD @ torch.randn(8, VOCAB)).logsumexp(-1).sum().backward()
    assert seen.elements >= REPLY * VOCAB
