"""How much of the training device's memory a step takes and how much is free. Knows nothing of who else uses the device.

The estimate counts, for one micro-batch of a given number of tokens:
    weights      the base model's, where they visit the device for the step
    adapter      A and B in float32 six times: themselves, gradients, Adam's two moments, the copy to undo with, the optimizer's temporaries
    activations  every layer's graph; or, where layers are computed twice, every layer's input and one layer's graph
    logits       a chunk of positions by the vocabulary four times: student, teacher, softmax, gradient
A layer's graph is taken as `GRAPH` times what its linear layers read and write (their norms, gates, rotated heads and gradients lie between
them). What steps were seen to take on the device is how much room is wanted, where that is more; without the estimate none is begun. So one
long conversation that ran out of memory is no reason to refuse the short ones after it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from claas.models.base_model import LoadedModel
from claas.training.defaults import default_lora
from claas.training.micro_batch import CHUNK
from claas.training.samples import MICRO_BATCH_TOKENS

LONG_SAMPLE_TOKENS = 4096
"""The longest sample that room is made for, unless a caller knows better; a longer one may run out of memory and then fails its step."""
GRAPH = 2.0
ADAPTER_COPIES = 6
LOGIT_COPIES = 4
RESERVE_BYTES = 512 * 2**20  # workspaces of matrix products, and what the allocator rounds up
AFTER_FAILURE = 1.25  # of what a step had when it ran out of memory
CHECKPOINTED_FROM_PARAMS = 1_000_000_000
MAX_GRAPH_BYTES = 4 * 2**30


def step_bytes(base: LoadedModel, tokens: int, *, weights: int) -> int:
    """Estimated bytes of device memory that a step takes, whose longest sample has `tokens` and whose `weights` bytes visit the device."""
    rank, _ = default_lora(base.n_params)
    adapter = ADAPTER_COPIES * torch.float32.itemsize * rank * _linear_features(base)
    head: nn.Linear = base.module.get_output_embeddings()
    logits = LOGIT_COPIES * CHUNK * head.out_features * base.dtype.itemsize
    return weights + adapter + activation_bytes(base, tokens, twice=checkpointed(base, tokens)) + logits + RESERVE_BYTES


def activation_bytes(base: LoadedModel, tokens: int, *, twice: bool) -> int:
    """Estimated bytes that a micro-batch's forward keeps for its backward, whose layers are computed `twice` or kept."""
    graph = _graph_bytes(base, tokens)
    if not twice:
        return graph
    inputs = base.config.num_hidden_layers * base.config.hidden_size * base.dtype.itemsize * _positions(tokens)
    return int(inputs + graph / base.config.num_hidden_layers)


def checkpointed(base: LoadedModel, tokens: int) -> bool:
    """Whether layers keep their input only and are computed again for the backward, which costs a third more time.

    Large models always; small ones for samples so long that the graph would take gigabytes.
    """
    return base.n_params >= CHECKPOINTED_FROM_PARAMS or _graph_bytes(base, tokens) > MAX_GRAPH_BYTES


def free_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory that nobody uses. None where there is no such figure: its memory is the machine's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    """Wait for what the device still computes."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def return_freed() -> None:
    """Hand freed memory of this process back to the system. glibc keeps it in the arena of the thread that took it, for the next thread
    there; a lesson's would stay beside the next one's."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch raises when a device's memory is used up: MPS has no type of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error))


def _positions(tokens: int) -> int:
    return max(tokens, MICRO_BATCH_TOKENS)


def _graph_bytes(base: LoadedModel, tokens: int) -> int:
    return int(GRAPH * _linear_features(base) * base.dtype.itemsize * _positions(tokens))


def _linear_features(base: LoadedModel) -> int:
    """Features in and out of all linear layers but the head, summed: what they read and write a token, and the size of a LoRA of rank 1."""
    head = base.module.get_output_embeddings()
    return sum(m.in_features + m.out_features for m in base.module.modules() if isinstance(m, nn.Linear) and m is not head)


class Gauge(Protocol):
    """What a device's allocator says of itself."""

    def reset(self) -> int:
        """Forget the highest use so far. Returns the present one, in bytes."""

    def peak(self) -> int:
        """The highest use since `reset`, in bytes."""


class CudaGauge:
    """torch's own allocator: what it has taken of the device, used or not."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_reserved(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)


class NoGauge:
    """A device whose memory is the machine's: nothing is known."""

    def reset(self) -> int:
        return 0

    def peak(self) -> int:
        return 0


class Meter:
    """The most that steps were seen to take beyond what was held before them, in bytes; 0 until one ran on a device that tells."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self.most = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around a step. One that ran out of memory would have needed more than it had."""
        held = self._gauge.reset()
        factor = 1.0
        try:
            yield
        except BaseException as error:
            factor = AFTER_FAILURE if out_of_memory(error.__cause__ or error) else 1.0
            raise
        finally:
            self.most = max(self.most, int(factor * (self._gauge.peak() - held)))


def meter_of(device: torch.device) -> Meter:
    """The meter for this device."""
    return Meter(CudaGauge(device) if device.type == "cuda" else NoGauge())
