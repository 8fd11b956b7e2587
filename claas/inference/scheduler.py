"""Continuous batching: one thread that reads waiting prompts, decodes all running replies together, and lets go of those that end.

Requests of users go before background ones, which never take more than half the slots. It knows jobs, rows and slots; it does not
know messages, files or HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from claas.core.errors import BackendUnavailable, Overloaded
from claas.inference.jobs import Item, Job, Reply, without_numbers
from claas.inference.outlet import Post
from claas.inference.prefill import PrefillQueue
from claas.inference.runner import ModelRunner
from claas.inference.sampling import sample
from claas.models.compute import ComputeShare, in_fresh_thread

# Tokens of prompts read between two decoding steps: on a CPU few, since running replies stand still meanwhile.
CHUNK_TOKENS = 512
CHUNK_TOKENS_BESIDE_REPLIES = 128
RETRY_AFTER_S = 5

log = logging.getLogger(__name__)


class _Begun(NamedTuple):
    """A reply whose prompt is read: row `row` of the cache, and the hidden state at its end."""

    reply: Reply
    prompt_end_D: Tensor
    cache: DynamicCache
    row: int


class Scheduler:
    """Owns the runner and the thread. `submit` and `cancel` may be called from anywhere, the rest happens in the thread.

    It works in another that ends when nothing is left to do; its torch threads would slow down a lesson beside them.
    """

    def __init__(self, runner: ModelRunner, share: ComputeShare, *, max_batch: int, max_queue: int) -> None:
        self._runner = runner
        self._share = share
        self._max_batch = max_batch
        self._max_background = max(1, max_batch // 2)
        self._max_queue = max_queue
        self._waiting: deque[Job] = deque()
        self._prefills = PrefillQueue(runner)
        self._begun: list[_Begun] = []
        self._running: list[Reply] = []
        self._n_taken = 0
        self._post = Post()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="claas-decode", daemon=True)
        self._thread.start()

    # --- From any thread ---

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Overloaded when the queue is full, BackendUnavailable when closing."""
        with self._wake:
            if self._closing:
                raise BackendUnavailable("the service is closing: try again later")
            if len(self._waiting) >= self._max_queue:
                raise Overloaded(
                    f"{self._max_queue} requests are waiting already: try again in {RETRY_AFTER_S} s", retry_after_s=RETRY_AFTER_S
                )
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants the job any more: its slot is free before the next step."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def counts(self) -> dict[str, int]:
        """Jobs that hold a slot, jobs that wait for one, and slots in all."""
        return {"running": self._n_taken, "waiting": len(self._waiting), "slots": self._max_batch}

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Abort all jobs and end the thread. Blocks until the step being done is over. Safe to call twice."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # --- Board: what jobs ask for once their prompt is read ---

    def begin(self, reply: Reply, prompt_end_D: Tensor, cache: DynamicCache, row: int) -> None:
        self._begun.append(_Begun(reply, prompt_end_D, cache, row))

    def send(self, job: Job, item: Item) -> None:
        self._post.send(job.outlet, item)

    # --- In the thread ---

    def _run(self) -> None:
        while self._wait_for_work():
            in_fresh_thread("claas-decode-busy", self._work)
        for job in (*self._running, *self._prefills.jobs, *self._waiting):
            self.send(job, job.aborted())
        self._post.flush()

    @torch.inference_mode()
    def _work(self) -> None:
        with self._share.serving():
            while self._has_work() and not self._closing:
                self._share.apply()
                self._step()

    def _wait_for_work(self) -> bool:
        """Sleep until there is work; False when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._has_work())
            return not self._closing

    def _has_work(self) -> bool:
        return bool(self._running or self._prefills or self._waiting)

    def _step(self) -> None:
        """Take in and let go, read some prompt, sample one token for every running reply, hand out what there is."""
        self._drop_cancelled()
        self._admit()
        try:
            if self._prefills:
                self._prefills.advance(self._chunk(), self)
        except Exception:
            # What is being read has caches of its own: running replies go on.
            log.exception("reading prompts broke: serving goes on without them")
            self._lose([*self._prefills.jobs, *(begun.reply for begun in self._begun)], "reading prompts")
            self._prefills.clear()
            self._begun = []
        try:
            if self._begun:
                self._start_begun()
            if self._running:
                self._decode()
        except Exception:
            log.exception("sampling broke: serving goes on without the replies in work")
            self._lose([*self._running, *(begun.reply for begun in self._begun)], "sampling")
            self._running, self._begun = [], []
            self._runner.slots.clear()
        self._n_taken = len(self._running) + len(self._prefills.jobs)
        self._post.flush()

    def _lose(self, jobs: list[Job], doing: str) -> None:
        for job in jobs:
            self.send(job, BackendUnavailable(f"{doing} broke while this request was in work: send it again"))

    def _drop_cancelled(self) -> None:
        if any(job.cancelled for job in self._waiting):
            with self._wake:
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
        self._remove([row for row, reply in enumerate(self._running) if reply.cancelled])

    def _admit(self) -> None:
        """Give free slots to those who wait: users first, then background jobs up to their share."""
        if not self._waiting:
            return
        taken = [*self._running, *self._prefills.jobs]
        free = self._max_batch - len(taken)
        free_background = min(free, self._max_background - sum(job.background for job in taken))
        with self._wake:
            users = [job for job in self._waiting if not job.background][:free]
            rest = max(0, min(free - len(users), free_background))
            admitted = users + [job for job in self._waiting if job.background][:rest]
            self._waiting = deque(job for job in self._waiting if job not in admitted)
        self._prefills.add(admitted, self._chunk())
        self._n_taken = len(taken) + len(admitted)

    def _chunk(self) -> int:
        return CHUNK_TOKENS_BESIDE_REPLIES if self._running and self._runner.device.type == "cpu" else CHUNK_TOKENS

    def _start_begun(self) -> None:
        """Sample the first token of every reply whose prompt was just read, and give those that go on a slot."""
        logits_BV = self._runner.logits(torch.stack([b.prompt_end_D for b in self._begun]))
        for b, token in zip(self._begun, sample(logits_BV, [b.reply.sampler for b in self._begun]), strict=True):
            if token is None:
                self.send(b.reply, without_numbers())
                continue
            chunk = b.reply.take(token)
            self.send(b.reply, chunk)
            if chunk.finish_reason is None:
                self._runner.slots.append(b.cache, b.row, len(b.reply.prompt))
                self._running.append(b.reply)
        self._begun = []
        self._post.flush()

    def _decode(self) -> None:
        """One more token for every running reply."""
        logits_BV = self._runner.decode([reply.last_id for reply in self._running], [reply.adapter for reply in self._running])
        tokens = sample(logits_BV, [reply.sampler for reply in self._running])
        ended = []
        for row, (reply, token) in enumerate(zip(self._running, tokens, strict=True)):
            if token is None:
                self._runner.slots.wipe(row)
                self.send(reply, without_numbers())
                ended.append(row)
                continue
            chunk = reply.take(token)
            self.send(reply, chunk)
            if chunk.finish_reason is not None:
                ended.append(row)
        self._remove(ended)

    def _remove(self, rows: list[int]) -> None:
        """Free these rows; the last row takes the place of each, here as in the slots."""
        for row in reversed(rows):
            self._runner.slots.remove(row)
            self._running[row] = self._running[-1]
            self._running.pop()
