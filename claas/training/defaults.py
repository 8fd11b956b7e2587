"""Lesson settings by the size of the base model. Decided by measurement: docs/decisions/0004-learning-defaults.md."""

from __future__ import annotations

from claas.core.types import TrainingConfig

SMALL_MODEL_PARAMS = 1_000_000_000


def default_training(n_params: int) -> TrainingConfig:
    """Under a billion parameters: few, large steps on hindsight rollouts. Above: the settings of the upstream recipe."""
    if n_params >= SMALL_MODEL_PARAMS:
        return TrainingConfig()
    return TrainingConfig(
        learning_rate=1e-3,
        gradient_steps=16,
        minibatch=4,
        hindsight_rollouts=8,
        hindsight_max_tokens=24,
        hindsight_temperature=0.5,
        guidance=1.0,
        min_lift=0.25,
        imagined_prompts=12,
        own_replies=False,
        anchors=16,
        replay=64,
        replay_steps=8,
        min_signal=0.02,
        max_kl=3.0,
    )


def default_lora(n_params: int) -> tuple[int, int]:
    """Rank and alpha of a new adapter."""
    return (8, 16) if n_params < SMALL_MODEL_PARAMS else (32, 64)
