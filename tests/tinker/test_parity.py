"""How far a lesson over the API is from the local engine's: the same samples, the same adapter to begin with, one optimizer step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from claas.adapters.filesystem import FilesystemAdapterStore
from claas.adapters.store import OPTIMIZER, WEIGHTS
from claas.adapters.tinker import TinkerAdapter
from claas.core.types import ChatMessage, DistillBatchItem, DistillBatchRequestPayload, LoraInitRequest, SampleSource, TrainingConfig
from claas.models.base_model import LoadedModel
from claas.models.chat_template import render
from claas.models.compute import ComputeShare
from claas.training.engine.local import LocalEngine
from claas.training.report import StepReport
from tests.doubles.tinker_faults import CLOUD, SKYRL, Ways
from tests.doubles.tinker_model import ALPHA
from tests.doubles.tinker_server import TinkerDouble
from tests.tinker.teaching import connected, place_of, teaching

A, RANK = "me/a", 8
PREFIX, SUFFIX = "base_model.model.", ".weight"
FIRST = ".exp_avg"  # Adam's first moment, which after one step is a tenth of the gradient


def lesson(model: LoadedModel, source: SampleSource) -> DistillBatchRequestPayload:
    """Six samples of different lengths, of tokens that the model finds likely enough to have an opinion on."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for at, text in enumerate(("Hello", "Who are you?", "the theory of it", "and then?", "one", "it is")):
        messages = (ChatMessage(role="user", content=text),)
        prompt = render(model.tokenizer, messages, {})
        ids = list(prompt)
        for _ in range(4 + 2 * at):
            with torch.no_grad():
                logits = model.module(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        reply = tuple(ids[len(prompt) :])
        item = DistillBatchItem(
            prompt=text, response="x", feedback="Say it in the other one's words.", messages=messages, source=source,
            response_logprobs=(-1.0,) * len(reply), prompt_token_ids=prompt, response_token_ids=reply,
        )  # fmt: skip
        samples.append(item)
    training = TrainingConfig(learning_rate=1e-4, teacher="base", teacher_top_k=1000, min_signal=0.0, max_kl=100.0, max_grad_norm=1e6)
    return DistillBatchRequestPayload(lora_id=A, training=training, samples=samples)


async def locally(model: LoadedModel, folder: Path, source: SampleSource) -> tuple[dict[str, Tensor], dict[str, Tensor], StepReport]:
    """The adapter before the lesson, the lesson's gradient, and its report."""
    store = FilesystemAdapterStore(folder, keep_versions=3)
    engine = LocalEngine(store, model, ComputeShare(1))
    try:
        await engine.init_lora(LoraInitRequest(lora_id=A, lora_r=RANK, lora_alpha=int(ALPHA)))
        report = StepReport.model_validate((await engine.distill(lesson(model, source))).metadata)
        assert report.outcome == "applied", report.reason
        before, moments = load_file(store.path(A, 0) / WEIGHTS), load_file(store.path(A, 1) / OPTIMIZER)
        first = {key.removesuffix(FIRST).replace(".default", ""): p for key, p in moments.items() if key.endswith(FIRST)}
        return before, first, report
    finally:
        await engine.aclose()


async def over_the_api(
    model: LoadedModel, ways: Ways, top_k: int, source: SampleSource, before: dict[str, Tensor]
) -> tuple[dict[str, Tensor], StepReport]:
    """The gradient of the same lesson at the same weights, and its report."""
    with TinkerDouble(model, ways, poll_s=0.2) as server:
        async with connected(place_of(server)) as (connection, _, _):
            run = await connection.new_run(model.id, rank=RANK, train_attn=True, train_mlp=True)
            server.engine.live[run.id].trainee.lora.update({key[len(PREFIX) : -len(SUFFIX)]: p.clone() for key, p in before.items()})
            state = (await connection.wait(run.client.save_state("from-local"))).path
        async with teaching(place_of(server), top_k=top_k) as (engine, adapters):
            await adapters.create(TinkerAdapter(lora_id=A, base_model=model.id, rank=RANK), state)
            report = StepReport.model_validate((await engine.distill(lesson(model, source))).metadata)
            assert report.outcome == "applied", report.reason
        made = next(c for c in server.engine.checkpoints.values() if c.name == "v1" and c.kind == "weights")
        return {f"{PREFIX}{key}{SUFFIX}": first for key, (first, _) in made.moments.items()}, report


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of two gradients, all layers joined."""
    assert one.keys() == other.keys()
    a, b = (torch.cat([gradient[key].flatten() for key in sorted(one)]) for gradient in (one, other))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


WHOLE = 320  # as many tokens as the tiny model has
CASES = {
    "whole": (CLOUD, WHOLE, 0.999),
    "likeliest": (CLOUD, 20, 0.5),
    # A random model is nearly flat, so that one token tells little; of a real one docs/decisions/0014-tinker.md has the figures.
    "token-sums": (CLOUD, 0, 0.05),
    "token-means": (SKYRL, 20, 0.05),
}


@pytest.mark.parametrize("source", ["sampled", "hindsight"])
@pytest.mark.parametrize("case", CASES)
async def test_an_update_over_the_api_points_where_the_local_one_does(
    tiny_model: LoadedModel, tmp_path: Path, case: str, source: SampleSource
) -> None:
    ways, top_k, near = CASES[case]
    before, local, told = await locally(tiny_model, tmp_path, source)
    remote, report = await over_the_api(tiny_model, ways, top_k, source, before)
    assert cosine(remote, local) > near
    ours, theirs = report.update, told.update
    assert ours.loss_after is not None and ours.loss_after < ours.loss_before
    if case == "whole":
        assert (ours.loss_before, ours.loss_after) == pytest.approx((theirs.loss_before, theirs.loss_after), rel=2e-3)
        assert ours.realised_kl == pytest.approx(theirs.realised_kl, rel=2e-2)
    else:
        assert 0 < ours.loss_before < theirs.loss_before, "a coarser loss is never larger"
