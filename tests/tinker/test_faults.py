"""What goes wrong with the double, and what the SDK makes of it: what an engine on top has to reckon with."""

from __future__ import annotations

import time
from concurrent.futures import TimeoutError as NotYet
from typing import Any

import pytest
import tinker
from tinker import types

from tests.doubles.tinker_server import TinkerDouble
from tests.tinker.peer import PROMPT, Peer, datum, logprobs, model_input, step, trained

ADAM = types.AdamParams(learning_rate=3e-3)


def test_a_wrong_key(cloud: TinkerDouble) -> None:
    service = tinker.ServiceClient(base_url=cloud.url, api_key="tml-wrong")
    with pytest.raises(tinker.AuthenticationError, match="Invalid API key"):
        service.get_server_capabilities()


def test_too_many_requests_are_made_again_when_it_says(hosted: Peer, cloud: TinkerDouble) -> None:
    client = hosted.train()
    cloud.fail("forward_backward", "status", status=429, retry_after=0.3, times=2)
    begun = time.monotonic()
    step(client)
    assert time.monotonic() - begun > 0.6
    assert cloud.called("forward_backward", "optim_step") == ["forward_backward"] * 3 + ["optim_step"]


@pytest.mark.parametrize("name", ["forward_backward", "optim_step", "asample", "retrieve_future", "save_weights"])
def test_errors_of_the_server_are_tried_again(hosted: Peer, cloud: TinkerDouble, name: str) -> None:
    client, other = hosted.train(), hosted.train()
    step(other)
    cloud.fail(name, "status", status=503, times=2)
    step(client)
    assert trained(client) == pytest.approx(trained(other), abs=1e-6)
    client.save_state("a").result()
    assert len(logprobs(hosted.base(), PROMPT)) == len(PROMPT) - 1
    assert not cloud.violations


def test_an_answer_that_is_lost_does_nothing_twice(hosted: Peer, cloud: TinkerDouble) -> None:
    client, other = hosted.train(), hosted.train()
    for _ in range(2):
        step(other)
    for name in ("forward_backward", "optim_step", "save_weights"):
        cloud.fail(name, "lost")
    for _ in range(2):
        step(client)
    client.save_state("a").result()
    assert cloud.called("forward_backward").count("forward_backward") == 5, "one of them came twice"
    assert trained(client) == pytest.approx(trained(other), abs=1e-6)
    assert not cloud.violations


@pytest.mark.parametrize("category", ["user", "server"])
def test_a_future_that_fails(hosted: Peer, cloud: TinkerDouble, category: str) -> None:
    client = hosted.train()
    cloud.fail("forward_backward", "fail", text="no memory left", category=category)
    with pytest.raises(tinker.RequestFailedError, match="no memory left") as failed:
        client.forward_backward([datum()], "cross_entropy").result()
    assert failed.value.category == category


def test_who_does_not_look_saves_what_failed(hosted: Peer, cloud: TinkerDouble) -> None:
    """The server takes it: a failure is known only to who awaits it."""
    client = hosted.train()
    before = trained(client)
    cloud.fail("forward_backward", "fail")
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(ADAM).result()
    path = client.save_state("nothing").result().path
    assert trained(hosted.resume(path)) == pytest.approx(before, abs=1e-6)
    assert cloud.violations == [
        f"{client.model_id}: optim_step without gradients",
        f"{client.model_id}: 'nothing' was saved after a request that failed",
    ]


def test_gradients_that_no_step_applied(hosted: Peer, cloud: TinkerDouble) -> None:
    client = hosted.train()
    client.forward_backward([datum()], "cross_entropy").result()
    client.save_state("half").result()
    assert cloud.violations == [f"{client.model_id}: 'half' was saved with gradients that no optim_step applied"]


def test_it_knows_whose_answer_was_never_fetched(hosted: Peer, cloud: TinkerDouble) -> None:
    request = {"prompt": {"chunks": [{"tokens": [1, 2]}]}, "sampling_params": {"max_tokens": 1}, "base_model": hosted.model}
    request_id = hosted.post("asample", request)["request_id"]
    assert cloud.unawaited() == ["asample"]
    hosted.post("retrieve_future", {"request_id": request_id})
    assert cloud.unawaited() == []


def test_what_takes_long_is_asked_for_again(hosted: Peer, cloud: TinkerDouble) -> None:
    cloud.poll_s = 0.1
    cloud.fail("asample", "slow", seconds=0.5)
    assert len(logprobs(hosted.base(), PROMPT)) == len(PROMPT) - 1
    assert len(cloud.called("retrieve_future")) >= 4


@pytest.mark.parametrize(("name", "do"), [("optim_step", "crash"), ("optim_step", "die"), ("retrieve_future", "hang")])
def test_a_server_that_is_gone_is_waited_for_without_end(hosted: Peer, cloud: TinkerDouble, name: str, do: str) -> None:
    """The SDK sets no limit: who asks must."""
    client = hosted.train()
    step(client)
    good = client.save_state("good").result().path
    said = trained(client)
    client.forward_backward([datum()], "cross_entropy").result()
    cloud.fail(name, do)
    future = client.optim_step(ADAM)
    with pytest.raises(NotYet):
        future.result(timeout=1.0)
    cloud.restart()
    assert trained(hosted.resume(good)) == pytest.approx(said, abs=1e-6), "checkpoints outlive it"
    with pytest.raises((ValueError, tinker.TinkerError)):
        trained(client)  # what was in memory does not
    assert not cloud.violations


def test_a_session_goes_on_after_a_restart(hosted: Peer, cloud: TinkerDouble) -> None:
    base = hosted.base()
    before = base.sample(model_input(PROMPT), 1, types.SamplingParams(max_tokens=4, seed=1)).result().sequences[0].tokens
    cloud.restart()
    assert base.sample(model_input(PROMPT), 1, types.SamplingParams(max_tokens=4, seed=1)).result().sequences[0].tokens == before


BAD: list[tuple[Any, str]] = [
    (types.Datum(model_input=model_input([1, 2]), loss_fn_inputs={"target_tokens": [2, 3], "weights": [1.0]}), "they must be alike"),
    (types.Datum(model_input=model_input([1, 99999]), loss_fn_inputs={"target_tokens": [2, 3]}), "ids of the model's vocabulary"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_data_that_cannot_be_computed_with(hosted: Peer, case: int) -> None:
    data, why = BAD[case]
    with pytest.raises(tinker.RequestFailedError, match=why):
        hosted.train().forward_backward([data], "cross_entropy").result()
