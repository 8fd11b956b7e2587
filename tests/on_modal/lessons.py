"""A lesson for a worker with the tiny model."""

from __future__ import annotations

from claas.core.types import ChatMessage, DistillBatchItem, DistillBatchRequestPayload, TrainingConfig

A = "me/a"


def lesson(**training: float) -> DistillBatchRequestPayload:
    item = DistillBatchItem(
        prompt="Hello", response="x", feedback="Be kind.", response_logprobs=(-1.0, -1.0, -1.0),
        messages=(ChatMessage(role="user", content="Hello"),), prompt_token_ids=(40, 41, 42), response_token_ids=(5, 6, 7),
    )  # fmt: skip
    return DistillBatchRequestPayload(lora_id=A, training=TrainingConfig.model_validate({"min_signal": 0.0} | training), samples=[item])
