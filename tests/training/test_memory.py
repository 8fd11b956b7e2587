"""What a step is said to take against what it is seen to take: every tensor of a real step is counted while it lives."""

from __future__ import annotations

import platform
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from claas.adapters.initialise import write_initial_adapter
from claas.core.errors import StepFailed
from claas.core.types import TrainingConfig
from claas.models.base_model import LoadedModel
from claas.models.compute import in_fresh_thread
from claas.training.batch import collate
from claas.training.defaults import default_lora
from claas.training.memory import (
    AFTER_FAILURE,
    CHECKPOINTED_FROM_PARAMS,
    MAX_GRAPH_BYTES,
    RESERVE_BYTES,
    Meter,
    activation_bytes,
    checkpointed,
    free_memory,
    meter_of,
    out_of_memory,
    return_freed,
    step_bytes,
)
from claas.training.policy import Policy
from claas.training.samples import MICRO_BATCH_TOKENS
from claas.training.step import LessonStep
from tests.training.conftest import ids, sample, unfuse

SIZES: dict[str, Any] = {
    "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def qwen3_8b(layers: int = 36) -> Qwen3Config:
    """Qwen3-8B's sizes, or as many of its layers."""
    return Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False,
    )  # fmt: skip


class Alive(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time; views of what was there before are not counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note(args, new=False)
        out = func(*args, **(kwargs or {}))
        self._note(out if isinstance(out, tuple | list) else (out,), new=True)
        self.peak = max(self.peak, sum(self._bytes.values()))
        return out

    def _note(self, tensors: Any, *, new: bool) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._bytes:
                self._bytes[storage._cdata] = storage.nbytes() if new else 0
                weakref.finalize(storage, self._bytes.pop, storage._cdata, None)


@dataclass(frozen=True, slots=True)
class Large(LoadedModel):
    """Small, and handled as a large model is."""

    @property
    def n_params(self) -> int:
        return int(CHECKPOINTED_FROM_PARAMS)


def built(config: PretrainedConfig, folder: Path, kind: type[LoadedModel], dtype: torch.dtype) -> LoadedModel:
    """A model with random weights, and version 0 of an adapter for it."""
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval().requires_grad_(False)
    base = kind("tiny", "tiny", config, None, module, torch.device("cpu"), dtype)
    rank, alpha = default_lora(base.n_params)
    write_initial_adapter(folder, config, base_model="tiny", rank=rank, alpha=alpha, target_modules=None)
    return base


def seen_bytes(base: LoadedModel, folder: Path, tokens: int) -> int:
    """The most that one step on one sample was seen to hold, weights aside."""
    training = TrainingConfig(learning_rate=1e-3, teacher_top_k=20, max_kl=100.0, min_signal=0.0)
    s = sample(1, prompt=tokens // 2, response=tokens - tokens // 2 - 4, teacher="live")
    assert s.length == tokens
    with Alive() as alive:
        policy = Policy(base, folder, tokens)
        unfuse(policy)
        result = LessonStep(policy, policy.optimizer(folder, 1e-3), training, [s], lambda: None).run()
    assert len(result.grad_norms) == 1 and result.after is not None, "the whole step ran"
    return int(alive.peak)


def sized(config: PretrainedConfig, device: str, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """A model of this size that would compute there; it has no weights."""
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LoadedModel("sized", "sized", config, None, module, torch.device(device), dtype)


@pytest.mark.parametrize("config", [Qwen3Config(**SIZES), LlamaConfig(**SIZES)], ids=["qwen3", "llama"])
@pytest.mark.parametrize("kind", [LoadedModel, Large], ids=["kept", "computed-twice"])
def test_the_estimate_is_over_what_a_step_is_seen_to_take_and_not_far(
    tmp_path: Path, config: PretrainedConfig, kind: type[LoadedModel]
) -> None:
    tokens = MICRO_BATCH_TOKENS + 256
    base = built(config, tmp_path, kind, torch.bfloat16)
    estimate, seen = step_bytes(base, tokens, weights=0) - RESERVE_BYTES, seen_bytes(base, tmp_path, tokens)
    assert seen <= estimate <= 2 * seen, (seen, estimate)


def test_computing_layers_twice_takes_less_and_changes_nothing(tmp_path: Path) -> None:
    config = Qwen3Config(**SIZES)
    gradients, seen = [], []
    for kind in (LoadedModel, Large):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        base = built(config, tmp_path, kind, torch.float32)
        write_initial_adapter(folder, config, base_model="tiny", rank=4, alpha=8, target_modules=None)
        policy = Policy(base, folder)
        with torch.no_grad():
            for name, parameter in policy.parameters.items():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        with Alive() as alive:
            policy.hidden(collate([ids(1, 100)], [ids(2, 100)])).square().mean().backward()
        gradients.append([p.grad for p in policy.parameters.values()])
        seen.append(alive.peak)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert seen[1] < seen[0] / 2


def test_a_step_of_an_8b_model_fits_into_22_gib_with_its_weights() -> None:
    base = sized(qwen3_8b(), "cuda")
    weights = sum(p.nbytes for p in base.module.parameters())
    assert weights / 2**30 == pytest.approx(15.26, abs=0.01)
    needs = [step_bytes(base, tokens, weights=weights) / 2**30 for tokens in (1, MICRO_BATCH_TOKENS, 2112, 4096)]
    assert needs[0] == needs[1] < needs[2] < needs[3] < 22
    assert step_bytes(base, 2112, weights=0) / 2**30 == pytest.approx(needs[2] - 15.26, abs=0.01)


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_large_models_compute_layers_twice_and_small_ones_for_long_samples(device: str) -> None:
    assert checkpointed(sized(qwen3_8b(), device), 1)
    small = sized(Qwen3Config(**SIZES), device)
    assert small.n_params < CHECKPOINTED_FROM_PARAMS
    fit = MICRO_BATCH_TOKENS * MAX_GRAPH_BYTES // activation_bytes(small, MICRO_BATCH_TOKENS, twice=False)
    assert [checkpointed(small, tokens) for tokens in (1, fit - 1, fit + 2)] == [False, False, True]


class Allocator:
    """A gauge that is told what is in use."""

    def __init__(self) -> None:
        self._now = self._most = 0

    def take(self, amount: int) -> None:
        self._now += amount
        self._most = max(self._most, self._now)

    def reset(self) -> int:
        self._most = self._now
        return self._now

    def peak(self) -> int:
        return self._most


def test_the_most_a_step_took_is_kept_and_what_was_held_before_does_not_count() -> None:
    allocator = Allocator()
    meter = Meter(allocator)
    allocator.take(1000)
    for taken in (300, 700, 500):
        with meter.watch():
            allocator.take(taken)
            allocator.take(-taken)
    assert meter.most == 700


@pytest.mark.parametrize("cause", [None, torch.OutOfMemoryError("CUDA out of memory")])
def test_a_step_that_ran_out_of_memory_would_have_taken_more_than_it_had(cause: Exception | None) -> None:
    allocator = Allocator()
    meter = Meter(allocator)

    def step() -> None:
        with meter.watch():
            allocator.take(1000)
            raise (StepFailed("does not fit") if cause else torch.OutOfMemoryError("CUDA out of memory")) from cause

    with pytest.raises((StepFailed, torch.OutOfMemoryError)):
        step()
    assert meter.most == AFTER_FAILURE * 1000


def test_any_other_error_says_nothing_of_memory() -> None:
    allocator = Allocator()
    meter = Meter(allocator)

    def step() -> None:
        with meter.watch():
            allocator.take(1000)
            raise ValueError("shapes do not match")

    with pytest.raises(ValueError, match="shapes"):
        step()
    assert meter.most == 1000
    said = {"CUDA out of memory. Tried": True, "MPS backend out of memory (MPS allocated": True, "shapes do not match": False}
    assert {text: out_of_memory(RuntimeError(text)) for text in said} == said


def test_the_cpu_has_no_figures() -> None:
    cpu = torch.device("cpu")
    assert free_memory(cpu) is None
    meter = meter_of(cpu)
    with meter.watch():
        torch.ones(1000)
    assert meter.most == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other C library is asked to hand memory back")
def test_what_a_thread_freed_goes_back_to_the_system() -> None:
    def resident() -> int:
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    def work() -> None:
        """Many pieces, too small to be mapped one by one, and every tenth of them stays while the others go: the heap has holes."""
        pieces = [torch.ones(64 * 1024 // 4) for _ in range(4000)]
        kept.extend(pieces[::10])

    kept: list[torch.Tensor] = []
    in_fresh_thread("pieces", work)
    held = resident()
    return_freed()
    assert held - resident() > 4000 * 64 * 1024 // 2
