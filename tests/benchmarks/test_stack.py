"""What the benchmarks' client makes of what it was sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.stack import Sent, ask, read, spread
from tests.api.conftest import on_socket
from tests.benchmarks.made_up import DONE, event
from tests.doubles.services import ADAPTER, BASE_MODEL, open_world


def test_stamps_are_of_the_events_that_showed_text_when_the_last_of_them_was_there() -> None:
    second = event(content="b", logprob=-0.5)
    sent = Sent("?", asked=10.0, speaker="assistant@3")
    sent.pieces = [
        (10.1, event(content="")),
        (10.2, event(content="a", logprob=-0.25)),
        (10.3, second[:20]),
        (10.4, second[20:] + event(content="c", logprob=-1.0)),
        (10.5, event(finish="length")),
        (10.6, event(tokens=3) + DONE[:7]),
        (10.7, DONE[7:]),
    ]
    reply = read(sent)
    assert (reply.text, reply.tokens, reply.finish, reply.failure, reply.id) == ("abc", 3, "length", None, "chatcmpl-1")
    assert reply.stamps == (10.2, 10.4, 10.4)
    assert reply.logprobs == (("a", -0.25), ("b", -0.5), ("c", -1.0))
    assert reply.first_token_s == pytest.approx(0.2)
    assert reply.per_token_s == pytest.approx((10.5 - 10.2) / 2)


@pytest.mark.parametrize(
    ("pieces", "failure", "cut"),
    [
        ([event(content="a")], None, True),  # the connection ended without a reason
        ([event(content="a"), event(finish="stop")], None, True),  # or without [DONE]
        ([event(content="a"), event(finish="abort"), DONE], None, True),
        ([event(content="a"), b'data: {"error": {"message": "vLLM failed"}}\n\n'], None, True),
        ([b'{"error": {"message": "try again"}}'], "status 503: try again", False),
        ([], "ConnectError: refused", False),
    ],
)
def test_whatever_did_not_end_as_a_reply_should_has_failed(pieces: list[bytes], failure: str | None, cut: bool) -> None:
    sent = Sent("?", asked=0.0, pieces=[(1.0 + at, piece) for at, piece in enumerate(pieces)], failure=failure)
    reply = read(sent)
    assert reply.failure is not None
    assert reply.cut is cut


async def test_a_service_is_asked_and_read(tmp_path: Path) -> None:
    how: dict[str, Any] = {"max_tokens": 100, "temperature": 0.0}
    async with open_world(tmp_path) as world, on_socket(world) as url, httpx.AsyncClient(base_url=url) as http:
        reply = read(await ask(http, ADAPTER, "Hello", logprobs=True, **how))
        base = read(await ask(http, BASE_MODEL, "Hello", **how))
        refused = read(await ask(http, "nobody", "Hello", **how))
    assert (reply.text, reply.speaker, reply.finish, reply.failure) == (f"[{ADAPTER}@0] Hello", f"{ADAPTER}@0", "stop", None)
    assert reply.tokens == len(reply.logprobs) == len(reply.text) + 1, "the end-of-text token counts and shows no text"
    assert reply.asked < reply.stamps[0] <= reply.stamps[-1] <= reply.ended
    assert (base.failure, base.speaker, base.logprobs) == (None, BASE_MODEL, ())
    assert refused.failure is not None
    assert refused.failure.startswith("status 404")
    assert not refused.cut


def test_spread_of_nothing_and_of_something() -> None:
    assert spread([]) == {"n": 0, "median": None, "p95": None, "max": None}
    assert spread([1.0, 2.0, 3.0]) == {"n": 3, "median": 2.0, "p95": 2.9, "max": 3.0}
