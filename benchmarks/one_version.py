"""Is a reply one version's, from its first token to its last? Told from its header, and from its tokens' logprobs.

A version, asked how likely the tokens of a reply of its own are, says what it said when it sampled them, but for the rounding of another
batch; another version says something else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import httpx
import numpy as np

from benchmarks.stack import Reply, spread

ADAPTER = "assistant"
NOISE_NATS = 0.02
"""What a token's logprob may differ from itself, on average, when it is computed in another batch in bfloat16."""


def named(reply: Reply) -> int | None:
    """The one version that the header names."""
    found = re.fullmatch(rf"{ADAPTER}@(\d+)", reply.speaker)
    return int(found[1]) if found else None


def mixed(said: Sequence[float], scored: Mapping[int, Sequence[float]], version: int) -> bool:
    """Whether a half of the reply is not `version`'s: its logprobs are not what that one gives, and another's are twice as near."""
    for half in (slice(0, len(said) // 2), slice(len(said) // 2, None)):
        gaps = {other: gap(said[half], logprobs[half]) for other, logprobs in scored.items()}
        if gaps[version] > NOISE_NATS and 2 * min(gaps.values()) < gaps[version]:
            return True
    return False


def gap(said: Sequence[float], scored: Sequence[float]) -> float:
    """Mean distance, nats a token."""
    return float(np.mean(np.abs(np.subtract(said, scored)))) if said else 0.0


def sample(replies: Sequence[Reply], changes: Sequence[float], most: int) -> list[Reply]:
    """Up to `most` replies that can be looked at again: first those that ran through one of the `changes`, then some from everywhere."""
    good = [reply for reply in replies if reply.failure is None and reply.text and len(reply.logprobs) > 1 and named(reply) is not None]
    through = [reply for reply in good if any(reply.asked < change < reply.ended for change in changes)]
    others = [reply for reply in good if reply not in through]
    left = max(0, most - len(through))
    return [*through, *others[:: max(1, len(others) // max(1, left))][:left]][:most]


async def look_again(
    http: httpx.AsyncClient, replies: Sequence[Reply], versions: Collection[int], changes: Sequence[float], most: int
) -> dict[str, Any]:
    """Ask the named version, and those beside it, how likely each token is. The wider the gap to the neighbours, the more this tells."""
    own: list[float] = []
    beside: list[float] = []
    wrong: list[str] = []
    read_otherwise = 0
    for reply in sample(replies, changes, most):
        version = named(reply)
        assert version is not None
        scored = {}
        for other in sorted({version - 1, version, version + 1} & set(versions)):
            if (logprobs := await _score(http, f"{ADAPTER}@{other}", reply)) is not None:
                scored[other] = logprobs
        if version not in scored:
            read_otherwise += 1
            continue
        said = [logprob for _, logprob in reply.logprobs][: len(scored[version])]
        own.append(gap(said, scored[version]))
        beside += [gap(said, logprobs) for other, logprobs in scored.items() if other != version]
        if mixed(said, scored, version):
            wrong.append(reply.id)
    through = sum(any(reply.asked < change < reply.ended for change in changes) for reply in replies)
    return {
        "ran_through_a_change": through,
        "looked_at": len(own),
        "read_otherwise": read_otherwise,
        "mixed": wrong,
        "gap_to_named_nats": spread(own),
        "gap_to_neighbours_nats": spread(beside),
    }


async def _score(http: httpx.AsyncClient, model: str, reply: Reply) -> list[float] | None:
    """Logprobs of the reply's tokens; None if its text, read, is other tokens than those that were sampled."""
    body = {"model": model, "messages": [{"role": "user", "content": reply.prompt}], "completion": reply.text}
    answer = await http.post("/v1/score", json=body)
    answer.raise_for_status()
    found, said = answer.json(), [token for token, _ in reply.logprobs]
    n = min(len(found["tokens"]), len(said))  # one of them may end with the end-of-text token
    if found["tokens"][:n] != said[:n] or abs(len(found["tokens"]) - len(said)) > 1:
        return None
    return [float(logprob) for logprob in found["logprobs"][:n]]
