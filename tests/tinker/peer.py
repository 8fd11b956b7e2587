"""Whoever speaks the Tinker API, the double or a real server, and how the tests ask it: through the true SDK, or past it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import tinker
from safetensors.torch import load
from tinker import types
from torch import Tensor

PROMPT = (1, 45, 50, 61, 70, 82)
REPLY = (90, 91, 90, 95, 99, 2)
RATE = 3e-3


class Peer:
    """A server to ask. What is created through it is unloaded by `forget`. `restart` is a SIGKILL and a new start."""

    def __init__(self, url: str, model: str, api_key: str, restart: Callable[[], None]) -> None:
        self.url, self.model, self.restart = url, model, restart
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers={"x-api-key": api_key}, timeout=300.0)
        self.service = tinker.ServiceClient(base_url=url, api_key=api_key)
        self.rest = self.service.create_rest_client()
        self._made: list[tinker.TrainingClient] = []

    def close(self) -> None:
        self.service.holder.close()
        self.http.close()

    def forget(self) -> None:
        for client in self._made:
            self.unload(client)
        self._made.clear()

    # Through the SDK

    def train(self, rank: int = 4, seed: int = 1) -> tinker.TrainingClient:
        """A new adapter, without the unembedding: not every server trains it."""
        return self._keep(self.service.create_lora_training_client(self.model, rank=rank, seed=seed, train_unembed=False))

    def resume(self, path: str, *, optimizer: bool = True) -> tinker.TrainingClient:
        how = self.service.create_training_client_from_state_with_optimizer if optimizer else self.service.create_training_client_from_state
        return self._keep(how(path))

    def _keep(self, client: tinker.TrainingClient) -> tinker.TrainingClient:
        self._made.append(client)
        return client

    def base(self) -> tinker.SamplingClient:
        return self.service.create_sampling_client(base_model=self.model)

    def at(self, path: str) -> tinker.SamplingClient:
        return self.service.create_sampling_client(model_path=path)

    # Past it

    def post(self, name: str, body: dict[str, Any], status: int = 200) -> Any:
        answer = self.http.post(f"/{name}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def unload(self, client: tinker.TrainingClient) -> None:
        """The SDK has no way to: a model stays in memory until its session ends."""
        answer = self.http.post("/unload_model", json={"model_id": client.model_id})
        if answer.status_code == 200:
            self.http.post("/retrieve_future", json={"request_id": answer.json()["request_id"]})

    def archive(self, run: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's two files in the archive of a checkpoint: configuration and weights."""
        url = self.rest.get_checkpoint_archive_url(run, name).result().url
        with tarfile.open(fileobj=io.BytesIO(self.http.get(url).raise_for_status().content)) as tar:
            files = {entry.name.removeprefix("./"): tar.extractfile(entry) for entry in tar.getmembers() if entry.isfile()}
            config, weights = files["adapter_config.json"], files["adapter_model.safetensors"]
            assert config is not None and weights is not None
            return json.load(config), load(weights.read())


def model_input(tokens: Sequence[int]) -> types.ModelInput:
    return types.ModelInput.from_ints(list(tokens))


def datum(prompt: Sequence[int] = PROMPT, reply: Sequence[int] = REPLY, **inputs: Sequence[float]) -> types.Datum:
    """Each token but the last, and what follows it. `inputs` are for the reply's tokens; before it they are 0, and weights 0."""
    whole = [*prompt, *reply]
    before = [0.0] * (len(prompt) - 1)
    padded = {name: [*before, *values] for name, values in ({"weights": [1.0] * len(reply)} | inputs).items()}
    return types.Datum(model_input=model_input(whole[:-1]), loss_fn_inputs={"target_tokens": whole[1:], **padded})


def step(client: tinker.TrainingClient, *data: types.Datum, loss_fn: Any = "cross_entropy", **params: float) -> dict[str, float]:
    """One optimizer step; returns what the server says of it."""
    client.forward_backward(list(data or [datum()]), loss_fn).result()
    return client.optim_step(types.AdamParams(**({"learning_rate": RATE} | params))).result().metrics or {}


def logprobs(client: tinker.SamplingClient, tokens: Sequence[int] = PROMPT + REPLY) -> list[float]:
    """Of each token but the first, whether the server counts that one or not."""
    found = client.compute_logprobs(model_input(tokens)).result()
    return [p for p in found[-(len(tokens) - 1) :] if p is not None]


def trained(client: tinker.TrainingClient, data: types.Datum | None = None) -> list[float]:
    """The same, of the weights in training."""
    (output,) = client.forward([data or datum()], "cross_entropy").result().loss_fn_outputs
    return list(output["logprobs"].data)
