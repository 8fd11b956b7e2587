"""A server that answers as a vLLM does where `claas doctor` asks: no model, only what the test wants it to say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from tests.doubles.http import Answering, handled_by

PATHS = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions"]
CONTROL = ["/pause", "/resume", "/sleep", "/wake_up", "/is_sleeping", "/release_kv_cache_memory"]
LORA = {"max_lora_rank": 32, "max_loras": 4, "max_cpu_loras": 32, "target_modules": ["q_proj", "v_proj"]}


def answers(model: str = "tiny", **changes: Any) -> dict[str, Any]:
    """Path → JSON of a vLLM on a GPU in which all is well, but for `changes`."""
    said: dict[str, Any] = {"version": "0.32.0", "paths": [*PATHS, *CONTROL], "lora": LORA, "sleep_mode": True} | changes
    return {
        "/version": {"version": said["version"]},
        "/v1/models": {
            "data": [{"id": model, "root": model, "parent": None}, {"id": "claas-a-v1", "root": "/adapters/a", "parent": model}]
        },
        "/openapi.json": {"paths": {path: {} for path in said["paths"]}},
        "/is_sleeping": {"is_sleeping": said.get("sleeping", False)},
        "/server_info": {
            "vllm_config": {
                "lora_config": said["lora"],
                "device_config": {"device": said.get("device", "cuda")},
                "model_config": {"enable_sleep_mode": said["sleep_mode"]},
            }
        },
    }


@contextmanager
def saying(answers: dict[str, Any], key: str = "") -> Iterator[str]:
    """Answers so on a free port, under /v1 only to those who have `key`; yields the URL."""

    class Handler(Answering):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            refused = path.startswith("/v1/") and key and self.headers.get("authorization") != f"Bearer {key}"
            status = 401 if refused else 200 if path in answers else 404
            self.answer(status, json.dumps(answers.get(path) if status == 200 else {"error": "no"}).encode())

    with handled_by(Handler) as url:
        yield url
