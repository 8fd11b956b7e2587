"""A step's operations on a device that is not there: sizes, dtypes and devices are worked out, nothing is computed, no memory is taken.

    python -m tests.training.other_device qwen3 | llama | wide

torch refuses an operation whose tensors are on different devices, so a tensor left on the CPU is an error here as it is on a GPU. Verdicts
read numbers, of which there are none: the parts of a step between them are run one by one. A process of its own, since torch's name for the
device can be given once. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AttentionInterface, LlamaConfig, PretrainedConfig, Qwen3Config

from claas.adapters.initialise import write_initial_adapter
from claas.core.types import TrainingConfig
from claas.models.base_model import LoadedModel
from claas.training.defaults import default_lora
from claas.training.memory import RESERVE_BYTES, step_bytes
from claas.training.policy import ADAM_BETAS, Policy
from claas.training.samples import Sample
from claas.training.step import LessonStep
from claas.training.teachers import Teacher
from tests.training.conftest import sample, unfuse
from tests.training.test_memory import SIZES, Alive, qwen3_8b, sized

TRAINING = TrainingConfig(learning_rate=1e-3, teacher_top_k=100, max_kl=100.0, min_signal=0.0)


def every_kind_of_sample() -> list[Sample]:
    control = sample(9).teacher_prompt
    return [
        sample(1, response=200, control_prompt=control),
        sample(2, response=150, on_policy=False, age=1, control_prompt=control),
        sample(3, source="hindsight", teacher="ema"),
        sample(4, taught=False),
        sample(5, source="anchor"),
    ]


def no_scores(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """What sdpa comes to on a GPU: no scores are kept."""
    assert mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out_BHLE = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal=True, scale=scaling)[0]
    return out_BHLE.transpose(1, 2).contiguous(), None


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The device, whose tensors have no values."""
    _setup_privateuseone_for_python_backend("elsewhere")
    module: Any = torch.get_device_module("elsewhere")
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.synchronize = lambda: None
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("elsewhere", 0)


def move(policy: Policy, device: torch.device) -> None:
    """The policy as it is built there: everything on the device, plain layers."""
    unfuse(policy)
    for module in policy._peft.modules():
        for name, parameter in [(n, p) for n, p in module._parameters.items() if p is not None]:
            there = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module._parameters[name] = nn.Parameter(there, requires_grad=parameter.requires_grad)
        for name, buffer in [(n, b) for n, b in module._buffers.items() if b is not None]:
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    policy.parameters = {n: p for n, p in sorted(policy._peft.named_parameters()) if p.requires_grad}
    policy.device = device


def step_on(config: PretrainedConfig, samples: list[Sample], training: TrainingConfig) -> dict[str, Any]:
    """Where a step's results are, and the bytes that it held at most, weights aside."""
    base = sized(config, "cpu")
    AttentionInterface.register("no_scores", no_scores)
    base.module.set_attn_implementation("no_scores")
    rank, alpha = default_lora(base.n_params)
    with tempfile.TemporaryDirectory() as temporary:
        write_initial_adapter(Path(temporary), config, base_model="sized", rank=rank, alpha=alpha, target_modules=None)
        tokens = max(s.length for s in samples)
        policy = Policy(LoadedModel("s", "s", config, None, base.module, torch.device("cpu"), base.dtype), Path(temporary), tokens)
    with elsewhere() as device:
        move(policy, device)
        policy.teachers = {"ema": Teacher(policy.snapshot(), 1)}
        with Alive() as alive:
            optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-3, betas=ADAM_BETAS)
            step = LessonStep(policy, optimizer, training, samples, lambda: None)
            measures = [step._accumulate(step._batches)]
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters.values(), 1.0)
            optimizer.step()
            measures.append(step._rescore())
            witnessed = step._witness()
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    gradients = [parameter.grad for parameter in policy.parameters.values()]
    results = [*(m.divergence for m in measures), *(m.logp for m in measures), *witnessed, norm, *moments, *gradients]
    adapter = sum(parameter.nbytes for parameter in policy.parameters.values())
    return {
        "devices": sorted({"none" if t is None else t.device.type for t in results}),
        "float32_moments": all(m.dtype == torch.float32 for m in moments),
        "tokens": measures[0].divergence.numel(),
        "held_bytes": alive.peak + adapter,
        "estimated_bytes": step_bytes(base, tokens, weights=0) - RESERVE_BYTES,
    }


def main() -> None:
    anchored = TRAINING.model_copy(update={"kl_reg_weight": 0.1})
    cases: dict[str, tuple[PretrainedConfig, list[Sample], TrainingConfig]] = {
        "qwen3": (Qwen3Config(**SIZES), every_kind_of_sample(), anchored),
        "llama": (LlamaConfig(**SIZES), every_kind_of_sample(), anchored),
        "wide": (qwen3_8b(layers=8), [sample(n, prompt=1024, response=1024) for n in range(2)], TRAINING),
    }
    print(json.dumps(step_on(*cases[sys.argv[1]])))  # noqa: T201


if __name__ == "__main__":
    main()
