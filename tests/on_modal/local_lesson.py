"""A program: teaches one lesson with the app's worker through `.local()`, where there is no Modal. Prints the worker's answers as JSON."""

from __future__ import annotations

import asyncio
import json
import sys

from claas.adapters.filesystem import FilesystemAdapterStore
from claas.core.types import ChatMessage, DistillBatchItem, DistillBatchRequestPayload, LoraInitRequest, TrainingConfig
from claas.models.compute import ComputeShare
from claas.models.load import load_base_model
from claas.training.engine.local import LocalEngine
from claas.training.engine.modal_app import DistillWorker, settings
from claas.training.engine.modal_wire import LessonCall, encode

LORA = "me/a"


async def make_adapter(lora_id: str) -> None:
    """Version 0, as another process would make it."""
    store = FilesystemAdapterStore(settings.adapters_dir, keep_versions=settings.keep_versions)
    engine = LocalEngine(store, load_base_model(settings), ComputeShare(1))
    await engine.init_lora(LoraInitRequest(lora_id=lora_id))
    await engine.aclose()


def lesson(lora_id: str) -> str:
    item = DistillBatchItem(
        prompt="Hello", response="x", feedback="Be kind.", response_logprobs=(-1.0, -1.0, -1.0),
        messages=(ChatMessage(role="user", content="Hello"),), prompt_token_ids=(40, 41, 42), response_token_ids=(5, 6, 7),
    )  # fmt: skip
    training = TrainingConfig(learning_rate=1e-2, teacher_top_k=20, max_kl=100.0, min_signal=0.0, min_reply_logprob=-100.0)
    payload = DistillBatchRequestPayload(lora_id=lora_id, training=training, samples=[item])
    return encode(LessonCall(call="one", base_model=sys.argv[1], payload=payload))


def main() -> None:
    worker = DistillWorker()
    asyncio.run(make_adapter(LORA))
    said = [worker.distill.local(lesson(LORA)), worker.distill.local(lesson("me/nobody")), worker.health.local()]
    sys.stdout.write(json.dumps([json.loads(text) for text in said]))


if __name__ == "__main__":
    main()
