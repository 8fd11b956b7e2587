"""What the scheduler works on: replies to sample and texts to score. They know their prompt and results, not each other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from transformers import DynamicCache

from claas.core.errors import BackendUnavailable
from claas.inference.base import GenerationChunk, SampledToken
from claas.inference.detokenize import Detokenizer
from claas.inference.outlet import Outlet
from claas.inference.runner import ModelRunner
from claas.inference.sampling import Sampler
from claas.models.lora import LoraWeights

Item = GenerationChunk | tuple[float, ...] | BackendUnavailable


def without_numbers() -> BackendUnavailable:
    """What a job gets whose logits are not finite: only weights far out of range do that, and only to those who speak through them."""
    return BackendUnavailable("this version of the adapter computes no numbers for this prompt: roll back to another, or delete it")


class Board(Protocol):
    """What a job whose prompt is read may ask for."""

    def begin(self, reply: Reply, prompt_end_D: Tensor, cache: DynamicCache, row: int) -> None:
        """Sample the reply from now on: the hidden state at its prompt's end, and the prompt as row `row` of the cache."""

    def send(self, job: Job, item: Item) -> None:
        """Hand a result to whoever asked."""


@dataclass(eq=False, kw_only=True)
class Job(ABC):
    """A prompt to be read through one adapter version, from its first token to its last. `adapter` None: the plain base model."""

    prompt: tuple[int, ...]
    adapter: LoraWeights | None
    background: bool
    outlet: Outlet[Item]
    cancelled: bool = False

    @abstractmethod
    def read(self, start: int, hidden_TD: Tensor, runner: ModelRunner) -> None:
        """Take the hidden states of the prompt's positions from `start` on; those behind its end mean nothing."""

    @abstractmethod
    def prefilled(self, board: Board, cache: DynamicCache, row: int) -> None:
        """The whole prompt is read."""

    @abstractmethod
    def aborted(self) -> Item:
        """What is sent when serving ends before the job does."""


@dataclass(eq=False, kw_only=True)
class Reply(Job):
    """A reply to sample: at most `limit` tokens, ending at any of `stop_ids` or at a stop string."""

    limit: int
    stop_ids: frozenset[int]
    sampler: Sampler
    detokenizer: Detokenizer
    n_tokens: int = 0
    last_id: int = -1
    _prompt_end_D: Tensor | None = None

    def read(self, start: int, hidden_TD: Tensor, runner: ModelRunner) -> None:
        last = len(self.prompt) - 1 - start
        if 0 <= last < len(hidden_TD):
            self._prompt_end_D = hidden_TD[last]

    def prefilled(self, board: Board, cache: DynamicCache, row: int) -> None:
        assert self._prompt_end_D is not None
        board.begin(self, self._prompt_end_D, cache, row)
        self._prompt_end_D = None

    def take(self, token: SampledToken) -> GenerationChunk:
        """Add a sampled token; the chunk says whether it was the last."""
        self.n_tokens += 1
        self.last_id = token.id
        if token.id in self.stop_ids:
            return GenerationChunk(self.detokenizer.finish(), (token,), "stop")
        text = self.detokenizer.push(token.id)
        if self.detokenizer.stopped:
            return GenerationChunk(text, (token,), "stop")
        if self.n_tokens == self.limit:
            return GenerationChunk(text + self.detokenizer.finish(), (token,), "length")
        return GenerationChunk(text, (token,))

    def aborted(self) -> GenerationChunk:
        return GenerationChunk(self.detokenizer.finish(), (), "abort")


@dataclass(eq=False, kw_only=True)
class Scoring(Job):
    """A text to score: `prompt` is all of it but its last token, `targets` are its last tokens, whose logprobs are wanted."""

    targets: Sequence[int]
    logprobs: list[float] = field(default_factory=list)

    def read(self, start: int, hidden_TD: Tensor, runner: ModelRunner) -> None:
        first = len(self.prompt) - len(self.targets)  # the position that predicts the first target
        begin, end = max(first, start), min(len(self.prompt), start + len(hidden_TD))
        if begin < end:
            self.logprobs += runner.logprobs(hidden_TD[begin - start : end - start], self.targets[begin - first : end - first])

    def prefilled(self, board: Board, cache: DynamicCache, row: int) -> None:
        board.send(self, without_numbers() if any(map(math.isnan, self.logprobs)) else tuple(self.logprobs))

    def aborted(self) -> BackendUnavailable:
        return BackendUnavailable("the service is closing: try again later")
