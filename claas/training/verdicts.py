"""Whether a lesson may step, and whether what it did must be taken back: from figures alone, the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from claas.core.types import SampleSource, TrainingConfig
from claas.training.samples import Part


def why_not_step(
    config: TrainingConfig, loss: float, grad_norm: float | None, taught: Collection[SampleSource], signal: float | None
) -> str | None:
    """Why the optimizer must not step: Adam would take a full-size step on noise, and spread a NaN everywhere.

    `taught` are the sources of the lesson's own samples and `signal` their mean loss; None after the first gradient step.
    """
    if not (math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))):
        return f"loss {loss} or gradient norm {grad_norm} is not finite"
    if signal is None:
        return None
    if config.needs_rollouts and set(taught) == {"sampled"}:
        return (
            "the model could not act on this feedback: with it in view, no reply of its own was fit to learn from. "
            "Say it in other words, or send the reply you wanted as a demonstration"
        )
    if signal < config.min_signal:
        return f"already known: the feedback changes the reply by {signal:.2g} nats a token, under min_signal {config.min_signal:g}"
    return None


def why_undo(config: TrainingConfig, before: Mapping[Part, float], after: Mapping[Part, float], moved: float) -> str | None:
    """Why the lesson must be taken back. Mean losses by part, and the mean KL to the policy it began as, nats a token."""
    if not (all(map(math.isfinite, after.values())) and math.isfinite(moved)):
        return "the new weights give a loss that is not finite"
    if after["lesson"] > before["lesson"]:
        return f"the loss rose from {before['lesson']:.4g} to {after['lesson']:.4g}: try a smaller learning_rate"
    if moved > config.max_kl:
        return f"the policy moved by {moved:.3g} nats a token, over max_kl {config.max_kl:g}: try a smaller learning_rate"
    # An adapter that is far away already, as an imported one may be, is not undone for coming nearer.
    if (strayed := after.get("anchor", 0.0)) > max(config.max_anchor_kl, before.get("anchor", 0.0)):
        return f"replies to unrelated prompts moved by {strayed:.3g} nats a token, over max_anchor_kl {config.max_anchor_kl:g}"
    if (lost := after.get("replay", 0.0) - before.get("replay", 0.0)) > config.max_forgetting:
        return f"earlier lessons would fade: their loss rose by {lost:.3g} nats a token, over max_forgetting {config.max_forgetting:g}"
    return None
