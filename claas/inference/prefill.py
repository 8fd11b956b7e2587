"""Reading prompts: short ones together, long ones in chunks, all in turn, so that nobody waits for another's long prompt to end.

A prompt that several ask for at once, as the replies of one request do, is read once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from claas.inference.jobs import Board, Job
from claas.inference.runner import ModelRunner


class PrefillQueue:
    """The prompts being read. Each gets one chunk a turn."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._queue: deque[_Prefill] = deque()

    def __bool__(self) -> bool:
        return bool(self._queue)

    @property
    def jobs(self) -> list[Job]:
        """All whose prompt is not read yet."""
        return [job for prefill in self._queue for job in prefill.jobs]

    def add(self, jobs: Sequence[Job], budget: int) -> None:
        """Begin to read these prompts: in groups that fit one chunk of `budget` tokens, padding included, and long ones alone."""
        same: dict[tuple[tuple[int, ...], int], list[Job]] = {}
        for job in sorted(jobs, key=lambda j: len(j.prompt)):
            same.setdefault((job.prompt, id(job.adapter)), []).append(job)
        group: list[list[Job]] = []
        for (prompt, _), alike in same.items():
            if group and (len(group) + 1) * len(prompt) > budget:
                self._queue.append(_Prefill(group, self._runner))
                group = []
            group.append(alike)
        if group:
            self._queue.append(_Prefill(group, self._runner))

    def advance(self, budget: int, board: Board) -> None:
        """One chunk, of at most `budget` tokens, of the prompts whose turn it is. Those nobody wants any more are dropped."""
        prefill = self._queue[0]
        unfinished = prefill.wanted and not prefill.advance(budget, board)
        self._queue.popleft()  # only now: what breaks while it is read must still be found here
        if unfinished:
            self._queue.append(prefill)

    def clear(self) -> None:
        """Forget them all."""
        self._queue.clear()


class _Prefill:
    """Some prompts on their way into a cache of their own, in step: a row for each, and the jobs that want it."""

    def __init__(self, rows: list[list[Job]], runner: ModelRunner) -> None:
        self._rows = rows
        self._runner = runner
        self._cache = runner.new_cache()
        self._n_read = 0
        self._longest = max(len(jobs[0].prompt) for jobs in rows)

    @property
    def jobs(self) -> list[Job]:
        return [job for jobs in self._rows for job in jobs]

    @property
    def wanted(self) -> bool:
        return any(not job.cancelled for job in self.jobs)

    def advance(self, budget: int, board: Board) -> bool:
        """Read the next chunk; whether it was the last."""
        start, self._n_read = self._n_read, min(self._n_read + max(1, budget // len(self._rows)), self._longest)
        chunks = [jobs[0].prompt[start : self._n_read] for jobs in self._rows]
        hidden_BTD = self._runner.prefill(chunks, self._cache, [jobs[0].adapter for jobs in self._rows])
        for jobs, hidden_TD in zip(self._rows, hidden_BTD, strict=True):
            for job in jobs:
                job.read(start, hidden_TD, self._runner)
        if self._n_read < self._longest:
            return False
        for row, jobs in enumerate(self._rows):
            for job in jobs:
                if not job.cancelled:
                    job.prefilled(board, self._cache, row)
        return True
