"""Where the base model's weights are between steps: on the training device for good, or at home in host memory, visiting it for a step.

Every module tree over the base shares its parameters and buffers, so what is done to them here holds for all trees. Weights are frozen:
nothing is ever copied back. It knows no adapter and no lesson; what a step made on the device is gone when its last reference is.
"""

from __future__ import annotations

import gc
import logging
import time
import traceback
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from claas.core.errors import StepFailed
from claas.models.base_model import LoadedModel
from claas.training.memory import out_of_memory, synchronize

_ALIGNMENT = 256  # bytes, as torch's own allocators give

log = logging.getLogger(__name__)

Move = Callable[[Tensor], Tensor]
"""A host tensor → a tensor with its values on the training device."""
Seconds = dict[str, float]


class Residency(ABC):
    """How a step gets its base weights onto the device."""

    visiting_bytes: int
    """What they take of the device for the step; 0 where they are there anyway."""

    @abstractmethod
    def on_device(self) -> AbstractContextManager[Seconds]:
        """Hold while a step computes. What it yields has, on leaving it, the seconds of `load` and `offload`, if there were any.

        Raises StepFailed on entering, with nothing left on the device, if they do not fit.
        """


class Resident(Residency):
    """The weights are on the device, shared with who serves there."""

    visiting_bytes = 0

    def on_device(self) -> AbstractContextManager[Seconds]:
        return nullcontext({})


RESIDENT = Resident()


class Visiting(Residency):
    """The weights are at home in one block of host memory, page-locked where the device is CUDA, and never read from disk again.

    One step at a time. On the CPU nothing moves. `move` None takes them to the base's device.
    """

    def __init__(self, base: LoadedModel, move: Move | None = None) -> None:
        self._device = base.device
        self._move = move or (lambda home: home.to(base.device, non_blocking=True))
        tensors = [*base.module.parameters(), *base.module.buffers()]
        self.visiting_bytes = 0 if base.device.type == "cpu" else sum(t.nbytes for t in tensors)
        self._homes = list(zip(tensors, _settle(tensors), strict=True))
        if base.device.type == "cuda":
            self._lock_pages()

    @contextmanager
    def on_device(self) -> Iterator[Seconds]:
        seconds: Seconds = {}
        try:
            with _timed(seconds, "load"):
                self._load()
            yield seconds
        except BaseException as error:
            _forget(error)
            raise
        finally:
            with _timed(seconds, "offload"):
                self._go_home()

    def _load(self) -> None:
        """All of them, or an error."""
        try:
            for tensor, home in self._homes:
                tensor.data = self._move(home)
            synchronize(self._device)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise StepFailed(
                f"the base model ({self.visiting_bytes / 2**30:.1f} GiB) does not fit into what is free of the memory of "
                f"{str(self._device)!r}: stop what else uses it, or let the serving engine sleep during lessons "
                "(CLAAS_VLLM_RELEASE=sleep). The version before it still serves"
            ) from error

    def _go_home(self) -> None:
        """Point everything at the host's copy, and give the device's memory back to whoever serves."""
        for tensor, home in self._homes:
            tensor.data = home
        if self._device.type != "cpu":
            gc.collect()  # a module tree may hold itself
            synchronize(self._device)
            torch.get_device_module(self._device).empty_cache()

    def _lock_pages(self) -> None:
        """So that copies to the GPU run at the bus's full speed. Locked in place: torch's own pinned memory comes in powers of two."""
        block = self._homes[0][1].untyped_storage()
        code = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes(), 0))
        if code != 0:
            log.warning("the base model's host memory cannot be page-locked (CUDA error %d): loading it for a lesson takes longer", code)
            return
        weakref.finalize(self, _unlock_pages, block.data_ptr()).atexit = False


def _unlock_pages(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


def _settle(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Move tensors into one block of memory that is the process' own: as loaded they may be pages of the model's files."""
    sizes = [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors]
    block = torch.empty(sum(sizes), dtype=torch.uint8)
    homes = []
    for tensor, part in zip(tensors, block.split(sizes), strict=True):
        home = part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        home.copy_(tensor)
        tensor.data = home
        homes.append(home)
    return homes


def _forget(error: BaseException | None) -> None:
    """Let go of the tensors that an error's traceback holds: they would stay on the device as long as the error is looked at."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextmanager
def _timed(seconds: Seconds, phase: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = time.perf_counter() - began
