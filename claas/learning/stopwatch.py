"""Wall-clock milliseconds by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Started when made; phases add up."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add({name: time.perf_counter() - began})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Phases that something else has timed."""
        for name, more in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + more

    def timing_ms(self) -> dict[str, int]:
        """Every phase, and `total` since the start. Phases that only other backends have are 0."""
        named = {"sleep": 0, "distill": 0, "save": 0, "wake": 0, "logprobs": 0}
        return (
            named
            | {name: round(1000 * s) for name, s in self._seconds.items()}
            | {"total": round(1000 * (time.perf_counter() - self._began))}
        )
