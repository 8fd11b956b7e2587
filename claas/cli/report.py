"""What a learning step did, in words: the service's answer to feedback, read and shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Step:
    """The figures of one step. Losses and KL are nats a token; `version` is the one that serves now; `seconds` are by phase."""

    outcome: str
    reason: str | None
    parent: int
    version: int
    contradicts: tuple[int, ...]
    loss_before: float
    loss_after: float | None
    realised_kl: float | None
    response_tokens: int
    optimizer_steps: int
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Self:
        """Read the body of `POST /v1/feedback`."""
        report = answer["distill_result"]["metadata"]
        timing_s = {phase: ms / 1000 for phase, ms in answer["timing_ms"].items() if ms and phase != "total"}
        return cls(
            outcome=report["outcome"],
            reason=answer["reason"],
            parent=report["parent"],
            version=answer["version"],
            contradicts=tuple(answer["contradicts"]),
            loss_before=report["update"]["loss_before"],
            loss_after=report["update"]["loss_after"],
            realised_kl=report["update"]["realised_kl"],
            response_tokens=report["cost"]["response_tokens"],
            optimizer_steps=report["update"]["optimizer_steps"],
            seconds=timing_s | {"total": answer["timing_ms"]["total"] / 1000},
        )

    @property
    def applied(self) -> bool:
        return self.outcome == "applied"

    def headline(self) -> str:
        """The outcome in one line."""
        if self.applied:
            return f"learnt: version {self.parent} → {self.version}, loss {figure(self.loss_before)} → {figure(self.loss_after)}"
        return f"{self.outcome}, version {self.version} serves on: {self.reason or 'no reason was given'}"

    def remarks(self) -> list[str]:
        """What the person should know besides."""
        if not self.contradicts:
            return []
        versions = f"version{'s' if len(self.contradicts) > 1 else ''} {', '.join(map(str, self.contradicts))}"
        return [f"this contradicts what was taught as {versions}: the newer wins"]

    def figures(self) -> str:
        """What it took, in one line."""
        phases = " + ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items() if name != "total" and seconds >= 0.05)
        return (
            f"KL {figure(self.realised_kl)} nat/token, {self.optimizer_steps} steps on {self.response_tokens} tokens, "
            f"{self.seconds['total']:.1f} s" + (f" ({phases})" if phases else "")
        )


def figure(value: float | None) -> str:
    """A loss or a KL, with three figures."""
    return "–" if value is None else f"{value:.3g}"
