"""How the double of Tinker behaves, what it writes down, and what it can be told to do wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tests.doubles.tinker_model import Reduction


@dataclass(frozen=True, slots=True)
class Ways:
    """Where servers of the API differ.

    reduction: see `model_pass`. first_is_none: prompt logprobs begin with None, one for each token; else they begin with the second's.
    topk: gives `topk_prompt_logprobs`; else None. clips: minds `grad_clip_norm`. checkpoints_end: they can be deleted and have a TTL;
    else those routes are 404. moments_optional: loading leaves Adam's state out unless asked; else it always comes. knows_models: refuses
    an unknown base model when it is named; else when it is first sampled from. failures: how a failed future says so. once: a request
    that comes twice is done once. protobuf: answers with it where the client takes it. own_slot: sampling leaves the training weights
    alone; else it needs the checkpoint's model in memory, and puts the checkpoint where that model's weights are. models: at most so
    many in memory. kinds: checkpoints are listed and archived as `weights/NAME`; else as `NAME`, and only the sampler's are archived.
    """

    reduction: Reduction = "sum"
    first_is_none: bool = True
    topk: bool = True
    clips: bool = True
    checkpoints_end: bool = True
    moments_optional: bool = True
    knows_models: bool = True
    failures: Literal["body", "status"] = "body"
    once: bool = True
    protobuf: bool = True
    own_slot: bool = True
    models: int | None = None
    kinds: bool = True


CLOUD = Ways()
SKYRL = Ways(
    reduction="mean", first_is_none=False, topk=False, clips=False, checkpoints_end=False, moments_optional=False, knows_models=False,
    failures="status", once=False, protobuf=False, own_slot=False, models=4, kinds=False,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it came. `name` is its route's: "forward_backward", "delete_checkpoint"."""

    name: str
    path: str
    body: Mapping[str, Any]


@dataclass(slots=True)
class Fault:
    """What goes wrong with the `nth` call of the route `name` from now on, and with the `times` − 1 after it (None: all of them).

    status: answered `status`, nothing done, with `retry-after` if given. hang: never answered, nothing done. delay: done after `seconds`.
    lost: done, and the connection is cut instead of an answer. die: the server dies before it is done.
    For what answers with a future: fail: the future fails with `text`. slow: it is ready after `seconds`. crash: the server dies at it.
    """

    name: str
    do: Literal["status", "hang", "delay", "lost", "die", "fail", "slow", "crash"]
    nth: int = 1
    times: int | None = 1
    status: int = 500
    text: str = "the double was told to fail"
    category: Literal["unknown", "server", "user"] = "server"
    seconds: float = 0.0
    retry_after: float | None = None
    seen: int = 0

    def strikes(self, name: str) -> bool:
        if name != self.name:
            return False
        self.seen += 1
        return self.seen >= self.nth and (self.times is None or self.seen < self.nth + self.times)
