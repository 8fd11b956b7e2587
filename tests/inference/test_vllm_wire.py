"""What is computed for each token that passes through: Python's calls are counted, since time depends on who else computes."""

from __future__ import annotations

import json
import sys
from types import FrameType

from claas.inference.base import SampledToken
from claas.inference.vllm_wire import EventReader

EVENT = {
    "id": "chatcmpl-1",
    "choices": [
        {
            "index": 0,
            "delta": {"content": " word"},
            "logprobs": {"content": [{"token": "token_id:1234", "logprob": -0.5, "bytes": None, "top_logprobs": []}]},
            "finish_reason": None,
            "token_ids": [1234],
        }
    ],
}
MOST_CALLS = 10


def test_a_token_is_read_in_a_few_calls() -> None:
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    data, reader = json.dumps(EVENT).encode(), EventReader(0)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        chunk = reader.read(data)
    finally:
        sys.setprofile(before)
    assert chunk is not None and chunk.tokens == (SampledToken(1234, -0.5),)
    assert 0 < len(calls) <= MOST_CALLS, calls
