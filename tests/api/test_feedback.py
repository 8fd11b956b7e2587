"""`/v1/feedback`, with the real learner over an engine that says it learned."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from claas.api.schemas.feedback import MAX_DEMONSTRATION_CHARS, MAX_FEEDBACK_CHARS
from claas.core.errors import BackendUnavailable, StepFailed, StorageFull
from claas.core.types import StepOutcome, TrainingConfig
from claas.training.hindsight import DISLIKED
from tests.api.conftest import in_process
from tests.api.wire import CHAT, HELLO, assert_error, chat
from tests.doubles.inference import Steps
from tests.doubles.services import ADAPTER, BASE_MODEL, World, open_world

URL = "/v1/feedback"
REPLY = f"[{ADAPTER}@0] Hello"


def about(completion_id: str, **fields: Any) -> dict[str, Any]:
    return {"requests": [{"completion_id": completion_id, "feedback": "Say good day."} | fields]}


async def test_the_whole_loop(client: httpx.AsyncClient, world: World) -> None:
    completion_id = (await chat(client))["id"]
    response = await client.post(URL, json=about(completion_id) | {"show": True})
    assert response.status_code == 200, response.text
    result = response.json()
    assert (result["status"], result["reason"], result["lora_id"], result["version"]) == ("ok", None, ADAPTER, 1)
    assert result["distill_result"]["metadata"]["update"]["loss_after"] == 0.25
    assert result["vllm"] == {"slept": False, "woke": False}
    assert {"sleep", "distill", "save", "wake", "logprobs", "total"} <= result["timing_ms"].keys()
    assert result["batch_size"] == 1
    assert not Path(result["feedback_log_path"]).is_absolute()
    assert (world.services.settings.log_dir / result["feedback_log_path"]).is_file()
    assert result["shown"] == [{"completion_id": completion_id, "prompt": "Hello", "before": REPLY, "after": f"[{ADAPTER}@1] Hello"}]
    lesson = world.engine.lessons[0].samples[0]
    assert (lesson.feedback, lesson.completion_id, lesson.response) == ("Say good day.", completion_id, REPLY)

    item = (await client.get(f"{URL}/{result['feedback_ids'][0]}")).json()
    assert (item["state"], item["version"], item["completion_id"]) == ("applied", 1, completion_id)
    assert (await client.post(CHAT, json=HELLO)).headers["x-claas-adapter"] == f"{ADAPTER}@1"


async def test_a_lesson_is_retracted_and_the_others_stay(client: httpx.AsyncClient, world: World) -> None:
    ids = []
    for _ in range(2):
        response = await client.post(URL, json=about((await chat(client))["id"]))
        ids += response.json()["feedback_ids"]
    answer = await client.delete(f"{URL}/{ids[0]}")
    assert (answer.status_code, answer.json()["id"], answer.json()["state"]) == (202, ids[0], "applied")
    await world.services.retraction.aclose()
    assert [(await client.get(f"{URL}/{feedback_id}")).json()["state"] for feedback_id in ids] == ["retracted", "applied"]
    assert world.engine.lessons[-1].parent == 0 and world.engine.lessons[-1].feedback_ids == (ids[1],)
    assert (await client.post(CHAT, json=HELLO)).headers["x-claas-adapter"] == f"{ADAPTER}@3"
    assert (await client.delete(f"{URL}/{ids[0]}")).json()["state"] == "retracted"


async def test_the_answer_names_what_it_contradicts(client: httpx.AsyncClient, world: World) -> None:
    completion_id = (await chat(client))["id"]
    demonstrated = [{"requests": [{"completion_id": completion_id, "demonstration": text}]} for text in ("Good day!", "Ahoy!")]
    answers = [(await client.post(URL, json=body)).json() for body in demonstrated]
    assert [answer["contradicts"] for answer in answers] == [[], [1]]
    assert answers[1]["distill_result"]["metadata"]["contradicts"] == [1]
    assert {sample.demonstration for sample in world.engine.lessons[1].samples} == {"Ahoy!"}


async def test_what_cannot_be_retracted(client: httpx.AsyncClient, world: World) -> None:
    assert_error(await client.delete(f"{URL}/fb-none"), 404, param="id", says="fb-none")
    world.engine.outcome = "skipped"
    feedback_id = (await client.post(URL, json=about((await chat(client))["id"]))).json()["feedback_ids"][0]
    assert_error(await client.delete(f"{URL}/{feedback_id}"), 409, param="id", says="nothing was learnt")


async def test_the_upstream_body_is_still_valid(client: httpx.AsyncClient) -> None:
    await chat(client)
    body = {
        "requests": [{"lora_id": ADAPTER, "prompt": "Hello", "response": REPLY, "feedback": "Shorter.", "training": {}}],
        "orchestration": {"sleep_before": True, "wake_after": True, "wake_on_failure": True, "sleep_level": 1},
    }
    response = await client.post(URL, json=body, headers={"prefer": "respond-async"})
    assert response.status_code == 200, response.text
    assert response.json()["status"] == "ok"


async def test_training_settings_reach_the_engine(client: httpx.AsyncClient, world: World) -> None:
    completion_id = (await chat(client))["id"]
    training = {"learning_rate": 1e-3, "is_clip": None, "gradient_steps": 2}
    await client.post(URL, json=about(completion_id, training=training, metadata={"by": "ann"}))
    lesson = world.engine.lessons[0]
    assert lesson.training == TrainingConfig(learning_rate=1e-3, is_clip=None, gradient_steps=2)


async def test_feedback_is_stripped_and_kept_with_its_metadata(client: httpx.AsyncClient, world: World) -> None:
    completion_id = (await chat(client))["id"]
    result = (await client.post(URL, json=about(completion_id, feedback="  Shorter.\n", metadata={"by": ["ann"]}))).json()
    item = await world.services.feedback.get(result["feedback_ids"][0])
    assert (item.feedback, item.metadata) == ("Shorter.", {"by": ["ann"]})


@pytest.mark.parametrize(
    ("said", "feedback", "demonstration"),
    [
        ({"demonstration": " Good day!\n"}, "", "Good day!"),
        ({"rating": 1}, "", REPLY),
        ({"rating": -1}, DISLIKED, None),
        ({"rating": -1, "demonstration": "Good day!"}, "", "Good day!"),
        ({"rating": -1, "feedback": "Too long."}, "Too long.", None),
        ({"rating": 1, "feedback": "Say good day.", "demonstration": "Good day!"}, "Say good day.", "Good day!"),
        ({"feedback": "Shorter.", "rating": None, "demonstration": None}, "Shorter.", None),
    ],
)
async def test_ratings_and_demonstrations(
    client: httpx.AsyncClient, world: World, said: dict[str, Any], feedback: str, demonstration: str | None
) -> None:
    completion_id = (await chat(client))["id"]
    response = await client.post(URL, json={"requests": [{"completion_id": completion_id} | said]})
    assert response.status_code == 200, response.text
    own = world.engine.lessons[0].samples[0]
    assert (own.source, own.feedback, own.demonstration) == ("sampled", feedback, demonstration), "what the teacher is shown"
    item = (await client.get(f"{URL}/{response.json()['feedback_ids'][0]}")).json()
    kept = {"feedback": "", "rating": None, "demonstration": None} | {k: v.strip() if isinstance(v, str) else v for k, v in said.items()}
    assert {name: item[name] for name in kept} == kept, "what was said is kept as it was said"


async def test_the_same_key_twice_is_one_lesson(client: httpx.AsyncClient, world: World) -> None:
    body = about((await chat(client))["id"], idempotency_key="k1")
    first, second = (await client.post(URL, json=body)).json(), (await client.post(URL, json=body)).json()
    assert second["feedback_ids"] == first["feedback_ids"]
    assert second["version"] == first["version"] == 1
    assert len(world.engine.lessons) == 1


@pytest.mark.parametrize("outcome", ["skipped", "undone"])
async def test_a_lesson_that_changed_nothing_says_why(client: httpx.AsyncClient, world: World, outcome: StepOutcome) -> None:
    world.engine.outcome = outcome
    result = (await client.post(URL, json=about((await chat(client))["id"]))).json()
    assert (result["status"], result["version"]) == (outcome, 0)
    assert outcome in result["reason"]


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (StepFailed("the loss is not a number: lower the learning rate"), 500, "step_failed"),
        (StorageFull("no space is left"), 503, "storage_full"),
        (BackendUnavailable("the engine is closing"), 503, "backend_unavailable"),
        (RuntimeError("secret detail"), 500, "internal_error"),
    ],
)
async def test_a_step_that_breaks_loses_nothing(
    client: httpx.AsyncClient, world: World, failure: Exception, status: int, code: str
) -> None:
    completion_id = (await chat(client))["id"]
    world.engine.failure = failure
    response = await client.post(URL, json=about(completion_id))
    assert assert_error(response, status)["code"] == code
    assert "secret" not in response.text
    kept = await world.services.feedback.list(ADAPTER)
    assert [(item.state, item.completion_id) for item in kept] == [("failed", completion_id)]
    assert (await client.post(CHAT, json=HELLO)).headers["x-claas-adapter"] == f"{ADAPTER}@0"


async def test_a_busy_adapter(tmp_path: Path) -> None:
    async with open_world(tmp_path, feedback_lock_timeout_s=0.01) as world, in_process(world) as client:
        completion_id = (await chat(client))["id"]
        world.inference.steps = steps = Steps()  # the first lesson waits for the check of its new version
        first = asyncio.create_task(client.post(URL, json=about(completion_id)))
        await asyncio.wait_for(steps.blocked.wait(), 10)
        response = await client.post(URL, json=about(completion_id))
        assert assert_error(response, 409, param="lora_id", says="still learning")["code"] == "adapter_busy"
        assert int(response.headers["retry-after"]) > 0
        steps.release_many(1000)
        assert (await first).status_code == 200


async def test_unknown_replies(client: httpx.AsyncClient) -> None:
    assert_error(await client.post(URL, json=about("chatcmpl-none")), 404, param="completion_id", says="chatcmpl-none")
    body = {"requests": [{"lora_id": ADAPTER, "prompt": "Hello", "response": "never said", "feedback": "x"}]}
    assert_error(await client.post(URL, json=body), 404, param="response")
    assert_error(await client.get(f"{URL}/fb-none"), 404, param="id", says="fb-none")


async def test_replies_that_cannot_be_taught(client: httpx.AsyncClient, world: World) -> None:
    for changes, says in (({"max_tokens": 3}, "token limit"), ({"model": BASE_MODEL}, "base model")):
        completion_id = (await chat(client, **changes))["id"]
        assert_error(await client.post(URL, json=about(completion_id)), 422, param="requests.0", says=says)
    world.inference.broken_after = 3
    await client.post(CHAT, json=HELLO)
    aborted = next(rollout.id for rollout in world.rollouts.kept.values() if rollout.finish_reason == "abort")
    assert_error(await client.post(URL, json=about(aborted)), 422, param="requests.0", says="aborted")
    assert not await world.services.feedback.list()


async def test_an_adapter_that_does_not_match(client: httpx.AsyncClient) -> None:
    completion_id = (await chat(client))["id"]
    assert_error(await client.post(URL, json=about(completion_id, lora_id="me/other")), 422, param="requests.0", says="'me/other'")


ITEM: dict[str, Any] = {"completion_id": "chatcmpl-x", "feedback": "Shorter."}
SPELLED: dict[str, Any] = {"lora_id": ADAPTER, "prompt": "Hello", "response": "Hi", "feedback": "Shorter."}


@pytest.mark.parametrize(
    ("item", "param", "says"),
    [
        (ITEM | {"feedback": ""}, "requests.0.feedback", "at least 1"),
        (ITEM | {"feedback": " \n "}, "requests.0.feedback", "at least 1"),
        (ITEM | {"feedback": "x" * (MAX_FEEDBACK_CHARS + 1)}, "requests.0.feedback", "8000"),
        (ITEM | {"feedback": None}, "requests.0.feedback", "missing: send 'feedback', 'rating' or 'demonstration'"),
        (ITEM | {"feedback": 3}, "requests.0.feedback", "string"),
        (ITEM | {"feedback": "", "rating": 1}, "requests.0.feedback", "at least 1"),
        ({"completion_id": "chatcmpl-x"}, "requests.0.feedback", "missing"),
        ({"completion_id": "chatcmpl-x", "rating": None, "demonstration": None}, "requests.0.feedback", "missing"),
        ({"feedback": "x"}, "requests.0", "'lora_id' is missing"),
        (ITEM | {"prompt": "Hello"}, "requests.0", "once"),
        (SPELLED | {"completion_id": "chatcmpl-x"}, "requests.0", "once"),
        ({k: v for k, v in SPELLED.items() if k != "response"}, "requests.0", "'response' is missing"),
        (SPELLED | {"lora_id": "../up"}, "requests.0.lora_id", "adapter id"),
        (SPELLED | {"lora_id": "a\tb"}, "requests.0.lora_id", "adapter id"),
        (SPELLED | {"lora_id": f"{ADAPTER}@1"}, "requests.0.lora_id", "adapter id"),
        (ITEM | {"completion_id": "a b"}, "requests.0.completion_id", "without spaces"),
        (ITEM | {"rating": 0}, "requests.0.rating", "1 or -1"),
        (ITEM | {"rating": 5}, "requests.0.rating", "1 or -1"),
        (ITEM | {"rating": "1"}, "requests.0.rating", "1 or -1"),
        (ITEM | {"rating": True}, "requests.0.rating", "1 or -1"),
        (ITEM | {"rating": 1.0}, "requests.0.rating", "1 or -1"),
        ({"completion_id": "chatcmpl-x", "rating": 2}, "requests.0.rating", "1 or -1"),
        (ITEM | {"demonstration": ""}, "requests.0.demonstration", "at least 1"),
        (ITEM | {"demonstration": " \n "}, "requests.0.demonstration", "at least 1"),
        (ITEM | {"demonstration": ["Hi"]}, "requests.0.demonstration", "string"),
        (ITEM | {"demonstration": "x" * (MAX_DEMONSTRATION_CHARS + 1)}, "requests.0.demonstration", "32000"),
        (ITEM | {"idempotency_key": ""}, "requests.0.idempotency_key", "without spaces"),
        (ITEM | {"metadata": []}, "requests.0.metadata", "object"),
        (ITEM | {"training": {"lr": 1}}, "requests.0.training.lr", "unknown"),
        (ITEM | {"training": {"learning_rate": 0}}, "requests.0.training.learning_rate", "greater than 0"),
        (ITEM | {"training": {"alpha": 1.5}}, "requests.0.training.alpha", "less than or equal to 1"),
        (ITEM | {"training": {"teacher": "oracle"}}, "requests.0.training.teacher", "'live'"),
        (ITEM | {"training": []}, "requests.0.training", "object"),
        (ITEM | {"what": 1}, "requests.0.what", "unknown"),
        ("x", "requests.0", "object"),
    ],
)
async def test_wrong_items_are_named(client: httpx.AsyncClient, world: World, item: Any, param: str, says: str) -> None:
    assert_error(await client.post(URL, json={"requests": [item]}), 400, param=param, says=says)
    assert not await world.services.feedback.list()


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"requests": []}, "requests", "at least 1"),
        ({"requests": [ITEM] * 65}, "requests", "at most 64"),
        ({"wait": False}, "wait", "not available yet"),
        ({"wait": 1}, "wait", "boolean"),
        ({"orchestration": {"sleep_level": 3}}, "orchestration.sleep_level", "2"),
        ({"orchestration": {"nap": True}}, "orchestration.nap", "unknown"),
        ({"show": "yes"}, "show", "boolean"),
        ({"lora_id": ADAPTER}, "lora_id", "unknown"),
    ],
)
async def test_wrong_requests_are_named(client: httpx.AsyncClient, changes: dict[str, Any], param: str, says: str) -> None:
    assert_error(await client.post(URL, json={"requests": [ITEM]} | changes), 400, param=param, says=says)


async def test_a_client_that_leaves_does_not_stop_its_lesson(world: World, live: str) -> None:
    async with httpx.AsyncClient(base_url=live) as client:
        completion_id = (await chat(client))["id"]
        world.inference.steps = steps = Steps()
        asking = asyncio.create_task(client.post(URL, json=about(completion_id)))
        await asyncio.wait_for(steps.blocked.wait(), 10)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        steps.release_many(1000)
        await world.services.learner.aclose()
        assert [item.state for item in await world.services.feedback.list()] == ["applied"]
