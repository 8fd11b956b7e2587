"""What the double does as the hosted service does, where a self-hosted server differs: known from the SDK's sources and documents only."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from peft import PeftModel
from tinker import types

from claas.models.base_model import LoadedModel
from tests.doubles.tinker_faults import CLOUD
from tests.doubles.tinker_server import KEY, TinkerDouble
from tests.tinker.peer import PROMPT, REPLY, Peer, datum, logprobs, model_input, step, trained

WHOLE = PROMPT + REPLY


@pytest.fixture
def hosted_in_json(tiny_model: LoadedModel) -> Iterator[Peer]:
    with TinkerDouble(tiny_model, replace(CLOUD, protobuf=False)) as server:
        peer = Peer(server.url, tiny_model.id, KEY, server.restart)
        yield peer
        peer.close()


def test_prompts_are_scored_with_what_else_was_likely(hosted: Peer) -> None:
    params = types.SamplingParams(max_tokens=1)
    answer = hosted.base().sample(model_input(WHOLE), 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=4).result()
    own, top = answer.prompt_logprobs, answer.topk_prompt_logprobs
    assert own is not None and top is not None and len(own) == len(top) == len(WHOLE)
    assert own[0] is None and top[0] is None, "nothing precedes the first token"
    for token, logprob, row in zip(WHOLE[1:], own[1:], top[1:], strict=True):
        assert row is not None and len(row) == 4
        assert [p for _, p in row] == sorted((p for _, p in row), reverse=True)
        assert dict(row).get(token, logprob) == pytest.approx(logprob, abs=1e-5)
    assert hosted.base().compute_logprobs(model_input(WHOLE)).result() == pytest.approx(own, abs=1e-5)


def test_json_says_the_same_as_protobuf(hosted: Peer, hosted_in_json: Peer) -> None:
    def say(peer: Peer) -> list[Any]:
        params = types.SamplingParams(max_tokens=5, seed=3)
        answer = peer.base().sample(model_input(PROMPT), 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=2).result()
        sampled = [(s.tokens, s.logprobs, s.stop_reason) for s in answer.sequences]
        output = peer.train().forward([datum(), datum(REPLY, PROMPT)], "cross_entropy").result()
        passed = [(list(o["logprobs"].data), list(o["logprobs"].shape or ())) for o in output.loss_fn_outputs]
        return [sampled, answer.prompt_logprobs, answer.topk_prompt_logprobs, passed, output.metrics]

    assert torch_free(say(hosted)) == torch_free(say(hosted_in_json))


def torch_free(value: Any) -> Any:
    """Floats as float32 has them: protobuf carries no more."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, list | tuple):
        return [torch_free(item) for item in value]
    return {key: torch_free(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_losses_are_added_up(hosted: Peer) -> None:
    client = hosted.train()
    weights = [1.0, -1.0, 0.5, -0.5, 2.0, -2.0]
    output = client.forward([datum(weights=weights)], "cross_entropy").result()
    assert output.metrics["loss:sum"] == pytest.approx(-sum(w * p for w, p in zip(weights, trained(client)[-6:], strict=True)), abs=1e-3)
    once, twice, pair = hosted.train(), hosted.train(), hosted.train()
    step(once, datum(weights=weights))
    step(twice, datum(weights=[2 * w for w in weights]))
    step(pair, datum(weights=weights), datum(weights=weights))
    assert trained(twice) == pytest.approx(trained(pair), abs=1e-4)
    assert trained(once) != pytest.approx(trained(client), abs=1e-2), "weights that add up to nothing do teach"


def test_importance_sampling_carries_any_gradient(hosted: Peer) -> None:
    plain, carried, own = hosted.train(), hosted.train(), hosted.train()
    wanted = [0.5, -0.25, 1.0, -1.0, 2.0, 0.75]
    step(plain, datum(weights=wanted))
    step(carried, datum(logprobs=trained(carried)[-6:], advantages=wanted), loss_fn="importance_sampling")
    assert trained(carried) == pytest.approx(trained(plain), abs=1e-4)

    def loss(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -(logprobs[0][-6:] * torch.tensor(wanted)).sum(), {}

    own.forward_backward_custom(
        [types.Datum(model_input=datum().model_input, loss_fn_inputs={"target_tokens": list(WHOLE[1:])})], loss
    ).result()
    own.optim_step(types.AdamParams(learning_rate=3e-3)).result()
    assert trained(own) == pytest.approx(trained(plain), abs=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
def test_many_targets_at_each_position(hosted: Peer, sparse: bool) -> None:
    """A teacher's likeliest tokens, with its probabilities as weights."""
    client = hosted.train()
    tokens = torch.tensor([[t, (t + 1) % 90, (t + 2) % 90] for t in WHOLE[1:]])
    weights = torch.zeros(tokens.shape)
    weights[-1 if sparse else -6 :] = torch.tensor([0.5, 0.3, 0.2])
    given = types.Datum(model_input=model_input(WHOLE[:-1]), loss_fn_inputs={"target_tokens": tokens, "weights": weights})
    assert (given.loss_fn_inputs["weights"].sparse_crow_indices is not None) == sparse
    (output,) = client.forward([given], "cross_entropy").result().loss_fn_outputs
    assert list(output["logprobs"].shape or ()) == [len(WHOLE) - 1, 3]
    rows = torch.tensor(output["logprobs"].data).reshape(-1, 3)
    assert rows[:, 0].tolist() == pytest.approx(trained(client), abs=1e-5)
    for _ in range(5):
        step(client, given)
    (after,) = client.forward([given], "cross_entropy").result().loss_fn_outputs
    assert (torch.tensor(after["logprobs"].data).reshape(-1, 3) * weights).sum() > (rows * weights).sum() + 0.2


def test_the_norm_to_clip_at_is_minded(hosted: Peer) -> None:
    free, clipped = hosted.train(), hosted.train()
    for client, norm in ((free, 0.0), (clipped, 1e-4)):
        step(client, grad_clip_norm=norm)
        step(client, datum(REPLY, PROMPT))
    assert trained(clipped) != pytest.approx(trained(free), abs=1e-3), "the first step weighs less in Adam's moments"


def test_moments_come_when_they_are_asked_for(hosted: Peer) -> None:
    client = hosted.train()
    step(client)
    path = client.save_state("half").result().path
    step(client, datum(REPLY, PROMPT))
    with_them, without = hosted.resume(path), hosted.resume(path, optimizer=False)
    assert trained(with_them) == pytest.approx(trained(without), abs=1e-6)
    for resumed in (with_them, without):
        step(resumed, datum(REPLY, PROMPT))
    assert trained(with_them) == pytest.approx(trained(client), abs=1e-5)
    assert trained(without) != pytest.approx(trained(client), abs=1e-2)


def test_a_checkpoint_is_what_it_was(hosted: Peer) -> None:
    client = hosted.train()
    step(client)
    old = hosted.at(client.save_weights_for_sampler("old").result().path)
    said = logprobs(old)
    step(client)
    now = trained(client)
    assert logprobs(old) == pytest.approx(said, abs=1e-6) and trained(client) == pytest.approx(now, abs=1e-6)
    hosted.unload(client)
    assert logprobs(old) == pytest.approx(said, abs=1e-6)


def test_a_client_that_samples_at_once(hosted: Peer) -> None:
    client = hosted.train()
    step(client)
    assert logprobs(client.save_weights_and_get_sampling_client()) == pytest.approx(trained(client), abs=1e-4)


def test_checkpoints_are_deleted(hosted: Peer) -> None:
    client = hosted.train()
    state, sampler = client.save_state("a").result().path, client.save_weights_for_sampler("a").result().path
    hosted.rest.delete_checkpoint_from_tinker_path(state).result()
    (left,) = hosted.rest.list_user_checkpoints().result().checkpoints
    assert (left.tinker_path, left.checkpoint_id) == (sampler, "sampler_weights/a")
    with pytest.raises(tinker.NotFoundError):
        hosted.rest.delete_checkpoint_from_tinker_path(state).result()
    with pytest.raises(tinker.NotFoundError):
        hosted.resume(state)
    assert client.save_state("a").result().path == state, "its name is free again"
    speaker = hosted.at(sampler)
    hosted.rest.delete_checkpoint_from_tinker_path(sampler).result()
    with pytest.raises(tinker.NotFoundError):
        logprobs(speaker)


def test_checkpoints_expire(hosted: Peer, cloud: TinkerDouble) -> None:
    client = hosted.train()
    short, long = (client.save_state(name, ttl_seconds=ttl).result().path for name, ttl in (("short", 60), ("long", 600)))
    kept = client.save_weights_for_sampler("kept", ttl_seconds=60).result().path
    hosted.rest.set_checkpoint_ttl_from_tinker_path(kept, None).result()
    cloud.pass_time(61)
    listed = hosted.rest.list_checkpoints(client.model_id).result().checkpoints
    assert {c.tinker_path: c.expires_at is None for c in listed} == {long: False, kept: True}
    with pytest.raises(tinker.NotFoundError):
        hosted.resume(short)
    with pytest.raises(tinker.BadRequestError):
        hosted.rest.set_checkpoint_ttl_from_tinker_path(long, 0).result()


def test_a_state_is_overwritten_if_that_is_meant(hosted: Peer) -> None:
    client = hosted.train()
    path = client.save_state("same").result().path
    hosted.post("save_weights", {"model_id": client.model_id, "path": "same"}, 409)
    step(client)
    assert client.save_state("same", overwrite=True).result().path == path
    assert trained(hosted.resume(path)) == pytest.approx(trained(client), abs=1e-6)


def test_a_model_that_it_has_not(hosted: Peer) -> None:
    with pytest.raises(tinker.BadRequestError, match="'nobody/nothing' is not supported"):
        hosted.service.create_lora_training_client("nobody/nothing")
    with pytest.raises(tinker.BadRequestError, match="'nobody/nothing' is not supported"):
        hosted.service.create_sampling_client(base_model="nobody/nothing")


def test_the_unembedding_is_trained_too(hosted: Peer) -> None:
    client = hosted.service.create_lora_training_client(hosted.model, rank=4)
    client.save_weights_for_sampler("whole").result()
    _, tensors = hosted.archive(client.model_id, "sampler_weights/whole")
    assert "base_model.model.lm_head.lora_A.weight" in tensors
    path = client.save_state("whole").result().path
    assert hosted.rest.get_weights_info_by_tinker_path(path).result().train_unembed is True


def test_an_archive_is_an_adapter_of_peft(hosted: Peer, tiny_model: LoadedModel, tmp_path: Path) -> None:
    client = hosted.train()
    for _ in range(3):
        step(client)
    client.save_weights_for_sampler("out").result()
    url = hosted.rest.get_checkpoint_archive_url(client.model_id, "sampler_weights/out").result().url
    with tarfile.open(fileobj=io.BytesIO(hosted.http.get(url).content)) as tar:
        tar.extractall(tmp_path, filter="data")
    model = PeftModel.from_pretrained(tiny_model.tree(), tmp_path)
    with torch.no_grad():
        logp = model(torch.tensor([WHOLE])).logits[0, :-1].log_softmax(-1)
    found = logp.gather(-1, torch.tensor(WHOLE[1:])[:, None])[:, 0]
    assert found.tolist() == pytest.approx(trained(client), abs=1e-4)
