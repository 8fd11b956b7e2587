"""A lesson's samples as a Tinker server takes them, what each is held to, and what comes back.

Shape legend
    L  positions of a sequence, its last token left out   T  response tokens   K  tokens of the support   S  buckets

The support of a position is the sampled token and, where the server tells the teacher's likeliest tokens, those too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tinker
from numpy.typing import NDArray
from tinker import types

from claas.core.errors import BackendUnavailable
from claas.models.tinker_server import Scored
from claas.training.engine.tinker_loss import Floats, buckets, divergence, weights
from claas.training.samples import PARTS, Part, Sample

MAX_LOG_RATIO = 20.0

Support = Literal["top_k", "sampled"]


@dataclass(frozen=True, slots=True)
class Target:
    """What one sample is held to, fixed at the start of the lesson: the tokens that are compared, and the teacher's logprobs of them."""

    sample: Sample
    alpha: float
    support: Support
    ids_TK: NDArray[np.int64]
    real_TK: NDArray[np.bool_]
    teacher_TK: Floats

    @property
    def teacher(self) -> Floats:
        """Its buckets, (T, S)."""
        return buckets(self.teacher_TK, self.real_TK)


@dataclass(frozen=True, slots=True)
class Measured:
    """One sample in one pass, token by token, (T,): its divergence, importance ratio, logprob, and how far it has moved since the start."""

    divergence: Floats
    ratio: Floats
    logp: Floats
    moved: Floats


def target_of(sample: Sample, scored: Scored, alpha: float) -> Target:
    """The teacher's answer as a target. Where it tells only of the sampled token, that token stands for the distribution."""
    ids = np.array(sample.response, dtype=np.int64)[:, None]
    logp = np.array(scored.logprobs)[:, None]
    if scored.top is None:
        return Target(sample, alpha, "sampled", ids, np.ones_like(ids, dtype=np.bool_), logp)
    K = min(map(len, scored.top))
    top_ids = np.array([[token for token, _ in place[:K]] for place in scored.top], dtype=np.int64)
    top_logp = np.array([[p for _, p in place[:K]] for place in scored.top])
    real = np.concatenate([np.ones_like(ids, dtype=np.bool_), top_ids != ids], axis=1)  # the sampled token is there already
    return Target(sample, alpha, "top_k", np.concatenate([ids, top_ids], axis=1), real, np.concatenate([logp, top_logp], axis=1))


def measure(target: Target, logp_TK: Floats, start_TK: Floats, is_clip: float | None) -> Measured:
    """How the student, whose logprobs of the support these are now and were at the start, stands to its target."""
    student_TS, start_TS = buckets(logp_TK, target.real_TK), buckets(start_TK, target.real_TK)
    return Measured(
        divergence=divergence(student_TS, target.teacher, target.alpha),
        ratio=_ratio(target.sample, logp_TK[:, 0], start_TK[:, 0], is_clip),
        logp=logp_TK[:, 0],
        moved=divergence(student_TS, start_TS, 1.0),
    )


def _ratio(sample: Sample, logp_T: Floats, start_T: Floats, is_clip: float | None) -> Floats:
    """P/P_old: of replies of an earlier version against what was served, of on-policy ones against the start, of others 1."""
    if sample.source != "sampled":
        return np.ones_like(logp_T)
    old_T = start_T if sample.on_policy else np.array(sample.served_logp)
    ratio_T: Floats = np.exp(np.clip(logp_T - old_T, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return ratio_T if is_clip is None else np.minimum(ratio_T, is_clip)


def carried(target: Target, logp_TK: Floats, ratio_T: Floats) -> Floats:
    """The weight of each logprob of the support, (T, K): minus the loss's gradient with respect to it."""
    taken = weights(buckets(logp_TK, target.real_TK), target.teacher, target.alpha)
    weighed: Floats = taken * ratio_T[:, None]
    return weighed


# --- On the wire ---


def question(sample: Sample, ids_TK: NDArray[np.int64]) -> tinker.Datum:
    """Asks for the logprobs of these ids, (T, K), where the response stands. With one id a position it is a plain sequence of targets."""
    return _datum(sample, {"target_tokens": _placed(sample, ids_TK, fill=True), "weights": np.zeros((_length(sample), ids_TK.shape[1]))})


def lesson(sample: Sample, ids_TK: NDArray[np.int64], logp_LK: Floats, weights_TK: Floats) -> tinker.Datum:
    """Carries weights of logprobs: as weighted cross-entropy of several targets a position, or as importance sampling of the one.

    `logp_LK` are the student's own at this moment, so that the ratio that importance sampling takes is 1 and its gradient the weight.
    """
    placed = _placed(sample, weights_TK, fill=False)
    targets = _placed(sample, ids_TK, fill=True)
    if ids_TK.shape[1] > 1:
        return _datum(sample, {"target_tokens": targets, "weights": placed})
    return _datum(sample, {"target_tokens": targets, "logprobs": logp_LK, "advantages": placed})


def loss_name(support: Support) -> Literal["cross_entropy", "importance_sampling"]:
    return "cross_entropy" if support == "top_k" else "importance_sampling"


def answers(output: types.ForwardBackwardOutput, asked: Sequence[tuple[Sample, int]]) -> list[Floats]:
    """The logprobs that a pass gives, (L, K) for each sample, of which so many ids a position were asked."""
    if len(output.loss_fn_outputs) != len(asked):
        raise BackendUnavailable("the Tinker server did not answer for every sample")
    return [
        np.array(found["logprobs"].data, dtype=np.float64).reshape(_length(sample), k)
        for found, (sample, k) in zip(output.loss_fn_outputs, asked, strict=True)
    ]


def of_response(sample: Sample, logp_LK: Floats) -> Floats:
    """The rows that predict the response, (T, K)."""
    return logp_LK[-len(sample.response) :]


def _length(sample: Sample) -> int:
    return len(sample.student_prompt) + len(sample.response) - 1


def _placed(sample: Sample, values_TK: NDArray[Any], *, fill: bool) -> NDArray[Any]:
    """Rows of the response in a whole sequence's, (L, K); before it nothing counts, so any id does."""
    before = np.zeros((_length(sample) - len(sample.response), values_TK.shape[1]), dtype=values_TK.dtype)
    if fill:
        before += np.array(sample.student_prompt[1:], dtype=values_TK.dtype)[:, None]
    return np.concatenate([before, values_TK])


def _datum(sample: Sample, inputs: Mapping[str, NDArray[Any]]) -> tinker.Datum:
    ids = [*sample.student_prompt, *sample.response][:-1]
    one = all(values.shape[1] == 1 for values in inputs.values())
    flat = {name: values[:, 0] if one else values for name, values in inputs.items()}
    typed = {name: values.astype(np.int64 if name == "target_tokens" else np.float32) for name, values in flat.items()}
    return tinker.Datum(model_input=types.ModelInput.from_ints(ids), loss_fn_inputs=typed)


def part_means(targets: Sequence[Target], columns: Sequence[Floats]) -> dict[Part, float]:
    """Mean over the tokens of each part that the lesson has."""
    found: dict[Part, float] = {}
    for part in PARTS:
        chosen = [column for target, column in zip(targets, columns, strict=True) if target.sample.part == part]
        if chosen:
            found[part] = float(np.concatenate(chosen).mean())
    return found
