"""One set of questions about the Tinker API, asked of the double and of a real server: what the double answers is what the server answers.

The server is SkyRL. Where the hosted service differs, see `Ways` and `test_hosted.py`. Replies are of few lengths: each is compiled.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import tinker
from tinker import types

from tests.tinker.peer import PROMPT, REPLY, Peer, datum, logprobs, model_input, step, trained

# What it is


def test_what_it_says_of_itself(peer: Peer) -> None:
    assert peer.http.get("/healthz").json() == {"status": "ok"}
    assert [model.model_name for model in peer.service.get_server_capabilities().supported_models] == [peer.model]
    assert peer.post("client/config", {"sdk_version": "0.24.1"}) == {"pjwt_auth_enabled": False}
    nothing = peer.http.get("/nothing")
    assert (nothing.status_code, nothing.json()) == (404, {"detail": "Not Found"})


def test_a_session_is_kept_alive(peer: Peer) -> None:
    session = peer.post("create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.24.1", "type": "create_session"})
    assert session["session_id"].startswith("session_") and session["type"] == "create_session"
    assert peer.post("session_heartbeat", {"session_id": session["session_id"]}) == {"type": "session_heartbeat"}
    assert peer.post("session_heartbeat", {"session_id": "session_none"}, 404) == {"detail": "Session not found"}


# What it says


def test_sampling_follows_its_seed(peer: Peer) -> None:
    base = peer.base()

    def say(n: int = 1, **how: Any) -> types.SampleResponse:
        return base.sample(model_input(PROMPT), n, types.SamplingParams(max_tokens=8, **how)).result()

    greedy = [say(temperature=0.0).sequences[0].tokens for _ in range(2)]
    assert greedy[0] == greedy[1] and len(greedy[0]) == 8
    many = say(3, temperature=1.0, seed=7).sequences
    assert [s.tokens for s in many] == [s.tokens for s in say(3, temperature=1.0, seed=7).sequences]
    assert len({tuple(s.tokens) for s in many}) > 1, "each sample has a seed of its own"
    assert [s.stop_reason for s in many] == ["length"] * 3
    for s in many:
        assert s.logprobs is not None and len(s.logprobs) == len(s.tokens) and max(s.logprobs) <= 0
    assert say(seed=7, top_k=1).sequences[0].tokens == greedy[0]


def test_a_reply_ends_with_what_stops_it(peer: Peer) -> None:
    base = peer.base()

    def say(stop: Any) -> types.SampledSequence:
        params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=3, stop=stop)
        return base.sample(model_input(PROMPT), 1, params).result().sequences[0]

    free = say(None)
    assert free.stop_reason == "length"
    token = free.tokens[5]
    cut = say([token])
    assert (cut.stop_reason, cut.tokens) == ("stop", free.tokens[: free.tokens.index(token) + 1])
    assert cut.logprobs == pytest.approx((free.logprobs or [])[: len(cut.tokens)], abs=1e-3)
    assert say([]).tokens == free.tokens


def test_a_given_text_is_scored_as_it_was_sampled(peer: Peer) -> None:
    base = peer.base()
    reply = base.sample(model_input(PROMPT), 1, types.SamplingParams(max_tokens=8, seed=5)).result().sequences[0]
    whole = [*PROMPT, *reply.tokens]
    scored = base.compute_logprobs(model_input(whole)).result()
    assert len(scored) == len(whole) - 1, "without the first token, which nothing precedes"
    assert scored[-8:] == pytest.approx(reply.logprobs, abs=0.05)
    params = types.SamplingParams(max_tokens=1)
    asked = base.sample(model_input(whole), 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=3).result()
    assert asked.prompt_logprobs == pytest.approx(scored, abs=1e-3)
    assert asked.topk_prompt_logprobs is None, "it gives none, and does not say so"


def test_a_model_that_it_has_not(peer: Peer) -> None:
    other = peer.service.create_sampling_client(base_model="nobody/nothing")
    with pytest.raises(ValueError, match=f"Engine is configured for '{peer.model}' but request specified 'nobody/nothing'"):
        other.compute_logprobs(model_input(PROMPT)).result()
    # For training it takes any name, and trains what it has.
    client = peer._keep(peer.service.create_lora_training_client("nobody/nothing", rank=4, train_unembed=False))
    assert len(trained(client)) == len(PROMPT + REPLY) - 1


# Training


def test_a_new_adapter_changes_nothing(peer: Peer) -> None:
    client = peer.train()
    base = logprobs(peer.base())
    assert trained(client) == pytest.approx(base, abs=0.05)
    path = client.save_weights_for_sampler("new").result().path
    assert logprobs(peer.at(path)) == pytest.approx(base, abs=0.05)


def test_a_model_pass_gives_logprobs_and_losses(peer: Peer) -> None:
    client = peer.train()
    weights = [0.5, 0.0, 1.0, -1.0, 2.0, 1.0]
    output = client.forward([datum(weights=weights), datum(REPLY, PROMPT)], "cross_entropy").result()
    assert len(output.loss_fn_outputs) == 2
    first = output.loss_fn_outputs[0]
    assert list(first["logprobs"].shape or ()) == list(first["elementwise_loss"].shape or ()) == [11]
    assert list(first["logprobs"].data) == pytest.approx(trained(client), abs=1e-3)
    padded = [0.0] * 5 + weights
    losses = [-w * p for w, p in zip(padded, first["logprobs"].data, strict=True)]
    assert list(first["elementwise_loss"].data) == pytest.approx(losses, abs=1e-3)


def test_learning_raises_what_it_was_taught(peer: Peer) -> None:
    client = peer.train()
    before = trained(client)
    for _ in range(4):
        step(client)
    after = trained(client)
    assert sum(after[-6:]) > sum(before[-6:]) + 1
    path = client.save_weights_for_sampler("taught").result().path
    assert logprobs(peer.at(path)) == pytest.approx(after, abs=0.05)
    assert logprobs(peer.base()) == pytest.approx(before, abs=0.05), "the base model is nobody's adapter"


def test_one_adapter_is_not_another(peer: Peer) -> None:
    one, two = peer.train(seed=1), peer.train(seed=1)
    before = trained(two)
    step(one)
    assert trained(two) == pytest.approx(before, abs=1e-3)
    step(two)
    assert trained(two) == pytest.approx(trained(one), abs=0.02), "the same seed and the same data: the same adapter"


def norm(peer: Peer, *data: types.Datum, loss_fn: str = "cross_entropy") -> float:
    """Of the gradient of a new adapter."""
    client = peer.train()
    found = step(client, *data, loss_fn=loss_fn)["skyrl.ai/grad_norm"]
    peer.unload(client)
    return found


def test_losses_are_divided_by_their_weights(peer: Peer) -> None:
    """The hosted service adds them up."""
    one = norm(peer, datum())
    assert norm(peer, datum(weights=[3.0] * 6)) == pytest.approx(one, rel=0.02)
    assert norm(peer, datum(), datum()) == pytest.approx(one, rel=0.02)
    assert norm(peer, datum(weights=[1.0, -1.0] * 3)) > 1e6 * one, "weights that add up to nothing blow up"


def test_importance_sampling_carries_any_gradient(peer: Peer) -> None:
    """With the weights' own logprobs, its gradient is that of −Σ advantage · logprob, divided by the number of tokens."""
    client = peer.train()
    fresh = trained(client)[-6:]
    wanted = [0.5, -0.25, 1.0, -1.0, 2.0, 0.75]
    carried = norm(peer, datum(logprobs=fresh, advantages=wanted), loss_fn="importance_sampling")
    plain = norm(peer, datum(weights=wanted))
    assert carried * 6 == pytest.approx(plain * sum(wanted), rel=0.03)


def test_a_norm_to_clip_at_is_not_minded(peer: Peer) -> None:
    one, two = peer.train(), peer.train()
    step(one, grad_clip_norm=0.0)
    step(two, grad_clip_norm=1e-9)
    assert trained(two) == pytest.approx(trained(one), abs=0.02)


# Checkpoints


def test_a_checkpoint_goes_on_as_if_nothing_had_been(peer: Peer) -> None:
    client = peer.train()
    for _ in range(2):
        step(client)
    path = client.save_state("half").result().path
    assert path == f"tinker://{client.model_id}/weights/half"
    half = trained(client)
    step(client, datum(REPLY, PROMPT))
    through = trained(client)
    resumed = peer.resume(path)
    assert trained(resumed) == pytest.approx(half, abs=1e-3)
    step(resumed, datum(REPLY, PROMPT))
    assert trained(resumed) == pytest.approx(through, abs=0.01), "with Adam's moments"
    # Those come even when they are not asked for.
    bare = peer.resume(path, optimizer=False)
    step(bare, datum(REPLY, PROMPT))
    assert trained(bare) == pytest.approx(through, abs=0.01)


def test_what_is_known_of_checkpoints(peer: Peer) -> None:
    client = peer.train(rank=2)
    state = client.save_state("a").result().path
    sampler = client.save_weights_for_sampler("b").result().path
    assert sampler == f"tinker://{client.model_id}/b", "not a path that the SDK can take apart"
    listed = {c.checkpoint_id: c for c in peer.rest.list_checkpoints(client.model_id).result().checkpoints}
    assert {name: c.checkpoint_type for name, c in listed.items()} == {"a": "training", "b": "sampler"}
    assert listed["a"].tinker_path == state
    assert listed["b"].tinker_path == f"tinker://{client.model_id}/sampler_weights/b"
    assert logprobs(peer.at(listed["b"].tinker_path)) == pytest.approx(logprobs(peer.at(sampler)), abs=1e-3)
    info = peer.rest.get_weights_info_by_tinker_path(state).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (peer.model, True, 2)
    run = peer.rest.get_training_run(client.model_id).result()
    assert (run.training_run_id, run.base_model, run.lora_rank) == (client.model_id, peer.model, 2)


def test_a_name_is_taken_once(peer: Peer) -> None:
    client = peer.train()
    client.save_state("taken").result()
    again = {"model_id": client.model_id, "path": "taken"}
    detail = {"detail": f"Checkpoint 'taken' already exists for model '{client.model_id}'"}
    assert peer.post("save_weights", again, 409) == detail
    client.save_weights_for_sampler("taken").result()  # the other kind has names of its own
    assert peer.post("save_weights_for_sampler", again, 409) == detail


def test_nothing_is_ever_deleted(peer: Peer) -> None:
    client = peer.train()
    path = client.save_state("kept").result().path
    with pytest.raises(tinker.NotFoundError):
        peer.rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.NotFoundError):
        peer.rest.set_checkpoint_ttl_from_tinker_path(path, 60).result()
    assert [c.checkpoint_id for c in peer.rest.list_checkpoints(client.model_id).result().checkpoints] == ["kept"]


def test_a_sampler_checkpoint_is_an_archive_for_peft(peer: Peer) -> None:
    client = peer.train(rank=4)
    step(client)
    client.save_weights_for_sampler("out").result()
    config, tensors = peer.archive(client.model_id, "out")
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 32, "LORA")
    assert config["target_modules"] is None, "which PEFT loads without a word, and wrong"
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{layer}.lora_A.weight"].shape[0] == tensors[f"{layer}.lora_B.weight"].shape[1] == 4
    kinds = {name.rsplit(".", 3)[1] for name in tensors}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    client.save_state("in").result()
    with pytest.raises(tinker.NotFoundError):
        peer.rest.get_checkpoint_archive_url(client.model_id, "in").result()


# Memory


def test_sampling_puts_the_checkpoint_in_the_place_of_what_is_trained(peer: Peer) -> None:
    """Why whoever trains an adapter must not be who serves it."""
    client = peer.train()
    step(client)
    old = client.save_weights_for_sampler("old").result().path
    said = logprobs(peer.at(old))
    step(client)
    assert logprobs(peer.at(old)) != pytest.approx(said, abs=0.05), "once loaded it is not loaded again: it speaks as what is trained"
    new = client.save_weights_for_sampler("new").result().path
    newest = trained(client)
    assert logprobs(peer.at(new)) == pytest.approx(newest, abs=0.05)
    assert logprobs(peer.at(old)) == pytest.approx(said, abs=0.05)
    assert trained(client) == pytest.approx(said, abs=0.05), "and what was trained is back where it was"


def test_a_sampler_checkpoint_needs_its_model_in_memory(peer: Peer) -> None:
    client = peer.train()
    path = client.save_weights_for_sampler("gone").result().path
    speaker = peer.at(path)
    assert len(logprobs(speaker)) == len(PROMPT + REPLY) - 1
    peer.unload(client)
    with pytest.raises(ValueError, match=f"Model {client.model_id} not loaded"):
        logprobs(speaker)
    with pytest.raises(ValueError, match=f"Model {client.model_id} not loaded"):
        trained(client)


def test_its_places_are_few(peer: Peer) -> None:
    kept = [peer.train(rank=1) for _ in range(4)]
    with pytest.raises(ValueError, match=r"Maximum number of LoRA adapters \(5\) reached"):
        peer.train()
    peer.unload(kept.pop())
    assert len(trained(peer.train())) == len(PROMPT + REPLY) - 1


def test_after_a_kill_only_checkpoints_are_left(peer: Peer) -> None:
    client = peer.train()
    step(client)
    state, sampler = client.save_state("left").result().path, client.save_weights_for_sampler("left").result().path
    said, speaker = trained(client), peer.at(sampler)
    peer.restart()
    with pytest.raises(ValueError, match=f"Model {client.model_id} not loaded"):
        trained(client)
    with pytest.raises(ValueError, match=f"Model {client.model_id} not loaded"):
        logprobs(speaker)
    resumed = peer.resume(state)
    assert trained(resumed) == pytest.approx(said, abs=1e-3)
    again = resumed.save_weights_for_sampler("left").result().path
    assert logprobs(peer.at(again)) == pytest.approx(said, abs=0.05), "saved anew, it speaks"


# Shapes


def shape(value: Any) -> Any:
    """The keys and types of an answer."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[-1])] if value else []
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def holds(whole: Any, part: Any, where: str = "") -> None:
    """Every key of `part` is in `whole`, with a value of the same type."""
    if isinstance(part, dict):
        assert part.keys() <= whole.keys(), f"{where}: {sorted(part.keys() - whole.keys())}"
        for key, value in part.items():
            holds(whole[key], value, f"{where}.{key}")
    elif isinstance(part, list):
        if part and whole:
            holds(whole[0], part[0], where)
    else:
        assert part == whole, where


def answers(peer: Peer) -> dict[str, Any]:
    """What it says of one of each request, past the SDK."""
    client = peer.train()
    model = {"model_id": client.model_id}
    targets = {"target_tokens": {"data": [2, 3], "dtype": "int64"}}
    given = {"data": [{"model_input": {"chunks": [{"tokens": [1, 2]}]}, "loss_fn_inputs": targets}], "loss_fn": "cross_entropy"}
    sampling = {"prompt": {"chunks": [{"tokens": [1, 2, 3]}]}, "sampling_params": {"max_tokens": 1}, "base_model": peer.model}
    said: dict[str, Any] = {}

    def done(name: str, body: dict[str, Any]) -> None:
        future = peer.post(name, body)
        said[name] = peer.post("retrieve_future", {"request_id": future["request_id"]})

    done("forward", model | {"forward_input": given})
    done("forward_backward", model | {"forward_backward_input": given})
    done("optim_step", model | {"adam_params": {"learning_rate": 0.001}})
    done("save_weights", model | {"path": "shape"})
    done("save_weights_for_sampler", model | {"path": "shape"})
    done("asample", sampling | {"prompt_logprobs": True})
    said["weights_info"] = peer.post("weights_info", {"tinker_path": said["save_weights"]["path"]})
    for path in ("get_server_capabilities", f"training_runs/{client.model_id}", f"training_runs/{client.model_id}/checkpoints"):
        said[path.replace(client.model_id, "RUN")] = peer.http.get(f"/{path}").json()
    sampler = peer.service.create_sampling_client(base_model=peer.model)._sampling_session_id
    said["samplers"] = peer.http.get(f"/samplers/{sampler}").json()
    peer.forget()
    return said


@pytest.mark.tinker
def test_no_answer_of_the_double_has_what_the_real_one_has_not(double: Peer, real: Peer) -> None:
    theirs, ours = answers(real), answers(double)
    assert theirs.keys() == ours.keys()
    for name, answer in ours.items():
        holds(shape(theirs[name]), shape(answer), name)
    assert all(math.isfinite(p) for p in theirs["asample"]["prompt_logprobs"])
