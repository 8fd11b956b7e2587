"""The routes of the double of Tinker: the SDK's request types in, answers in its shapes out. What takes long is submitted as a future."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from tinker import types
from tinker.types._pydantic_types.forward_backward_request import ForwardBackwardRequest
from tinker.types._pydantic_types.forward_request import ForwardRequest

from tests.doubles.tinker_engine import Checkpoint, Kind, Refused, Run, TinkerEngine

Json = dict[str, Any]
Route = Callable[[Json, HttpRequest], Json | Response]
CHECKPOINT = "/api/v1/training_runs/{run}/checkpoints/{name:path}"


class Submit(Protocol):
    """Has the work done in its turn; returns the future's id. `once` names a request that may come twice."""

    def __call__(self, name: str, work: Callable[[], Json], http: HttpRequest, *, once: str | None, model_id: str | None) -> str: ...


class Routes:
    """All but `retrieve_future`. A route's name is its method's."""

    def __init__(self, engine: TinkerEngine, submit: Submit) -> None:
        self.engine, self._submit = engine, submit
        self._ids = itertools.count(1)
        self._names: set[tuple[str, Kind, str]] = set()
        self._seq: dict[str, int] = {}

    def table(self) -> dict[tuple[str, str], Route]:
        post = (
            self.create_session, self.session_heartbeat, self.create_sampling_session, self.create_model, self.unload_model, self.get_info,
            self.forward, self.forward_backward, self.optim_step, self.save_weights, self.save_weights_for_sampler, self.load_weights,
            self.asample, self.weights_info, self.telemetry,
        )  # fmt: skip
        found: dict[tuple[str, str], Route] = {("POST", f"/api/v1/{route.__name__}"): route for route in post}
        found |= {
            ("GET", "/api/v1/healthz"): self.healthz,
            ("POST", "/api/v1/client/config"): self.client_config,
            ("GET", "/api/v1/get_server_capabilities"): self.get_server_capabilities,
            ("GET", "/api/v1/samplers/{sampler}"): self.samplers,
            ("GET", "/api/v1/training_runs/{run}"): self.training_run,
            ("GET", "/api/v1/training_runs/{run}/checkpoints"): self.checkpoints,
            ("GET", f"{CHECKPOINT}/archive"): self.archive,
            ("GET", f"{CHECKPOINT}/download"): self.download,
        }
        if self.engine.ways.checkpoints_end:
            found |= {
                ("GET", "/api/v1/checkpoints"): self.all_checkpoints,
                ("PUT", f"{CHECKPOINT}/ttl"): self.set_ttl,
                ("DELETE", CHECKPOINT): self.delete_checkpoint,
            }
        return found

    # Who is there

    def healthz(self, body: Json, http: HttpRequest) -> Json:
        return {"status": "ok"}

    def client_config(self, body: Json, http: HttpRequest) -> Json:
        types.ClientConfigRequest.model_validate(body)
        return {"pjwt_auth_enabled": False}

    def get_server_capabilities(self, body: Json, http: HttpRequest) -> Json:
        context = {"max_context_length": self.engine.model.max_context} if self.engine.ways.knows_models else {}
        return {"supported_models": [{"model_name": self.engine.model.id} | context]}

    def telemetry(self, body: Json, http: HttpRequest) -> Json:
        return {"status": "accepted"}

    def create_session(self, body: Json, http: HttpRequest) -> Json:
        types.CreateSessionRequest.model_validate(body)
        session_id = f"session_{next(self._ids):08x}"
        self.engine.sessions.add(session_id)
        return {"type": "create_session", "session_id": session_id}

    def session_heartbeat(self, body: Json, http: HttpRequest) -> Json:
        self._known_session(body["session_id"])
        return {"type": "session_heartbeat"}

    def create_sampling_session(self, body: Json, http: HttpRequest) -> Json:
        request = types.CreateSamplingSessionRequest.model_validate(body)
        self._known_session(request.session_id)
        if (request.base_model is None) == (request.model_path is None):
            raise Refused(400, "Exactly one of base_model or model_path must be provided")
        if request.base_model is not None:
            self.engine.check_base(request.base_model)
        elif self.engine.ways.own_slot:
            self.engine.at(request.model_path or "", "sampler_weights")
        return {"type": "create_sampling_session", "sampling_session_id": self._new_sampler(request.base_model or request.model_path or "")}

    def samplers(self, body: Json, http: HttpRequest) -> Json:
        sampler = self._sampler(http.path_params["sampler"])
        path = sampler if sampler.startswith("tinker://") else None
        base = self.engine.at(path, "sampler_weights").run.base_model if path else sampler
        return {"sampler_id": http.path_params["sampler"], "base_model": base, "model_path": path}

    # Models

    def create_model(self, body: Json, http: HttpRequest) -> Json:
        request = types.CreateModelRequest.model_validate(body)
        self._known_session(request.session_id)
        self.engine.check_base(request.base_model)
        if request.lora_config is None:
            raise Refused(422, "lora_config: Field required")
        once = f"{request.session_id}:train:{request.model_seq_id}"
        model_id = once if self.engine.ways.once else f"model_{next(self._ids):08x}"
        metadata = request.user_metadata or {}
        run = Run(model_id, request.session_id, request.base_model, request.lora_config, metadata, self.engine.now())
        self.engine.runs.setdefault(model_id, run)
        work = self._submit("create_model", lambda: self.engine.create(run), http, once=once, model_id=model_id)
        return {"request_id": work, "model_id": model_id}

    def unload_model(self, body: Json, http: HttpRequest) -> Json:
        request = types.UnloadModelRequest.model_validate(body)
        self.engine.run(request.model_id)
        work = self._submit("unload_model", lambda: self.engine.unload(request.model_id), http, once=None, model_id=request.model_id)
        return {"request_id": work, "model_id": request.model_id}

    def get_info(self, body: Json, http: HttpRequest) -> Json:
        run = self.engine.run(types.GetInfoRequest.model_validate(body).model_id)
        data = {"model_name": run.base_model}
        ours = {"type": "get_info", "is_lora": True, "lora_rank": run.lora.rank} if self.engine.ways.knows_models else {}
        return {"model_id": run.model_id, "model_data": data} | ours

    def training_run(self, body: Json, http: HttpRequest) -> Json:
        run = self.engine.run(http.path_params["run"])
        return {
            "training_run_id": run.model_id, "base_model": run.base_model, "model_owner": "default", "is_lora": True, "corrupted": False,
            "lora_rank": run.lora.rank, "last_request_time": _iso(run.created), "user_metadata": dict(run.metadata) or None,
        }  # fmt: skip

    def forward(self, body: Json, http: HttpRequest) -> Json:
        request = ForwardRequest.model_validate(body)
        return self._pass("forward", request.model_id, request.seq_id, request.forward_input, http)

    def forward_backward(self, body: Json, http: HttpRequest) -> Json:
        request = ForwardBackwardRequest.model_validate(body)
        return self._pass("forward_backward", request.model_id, request.seq_id, request.forward_backward_input, http)

    def _pass(self, name: str, model_id: str, seq_id: int | None, given: Any, http: HttpRequest) -> Json:
        def work() -> Json:
            outputs, loss = self.engine.model_pass(model_id, given, backward=name == "forward_backward")
            tensors = [
                {key: {"data": p.flatten().tolist(), "dtype": "float32", "shape": list(p.shape)} for key, p in o.items()} for o in outputs
            ]
            sums = self.engine.ways.reduction == "sum"
            kind = "TorchLossReturn" if sums else "scalar"
            return {"loss_fn_output_type": kind, "loss_fn_outputs": tensors, "metrics": {"loss:sum": loss} if sums else {}}

        return self._in_turn(name, model_id, seq_id, work, http)

    def optim_step(self, body: Json, http: HttpRequest) -> Json:
        request = types.OptimStepRequest.model_validate(body)
        work = lambda: self.engine.optim_step(request.model_id, request.adam_params)  # noqa: E731
        return self._in_turn("optim_step", request.model_id, request.seq_id, work, http)

    def load_weights(self, body: Json, http: HttpRequest) -> Json:
        request = types.LoadWeightsRequest.model_validate(body)
        assert request.model_id is not None, "the double does not create a model by loading"
        model_id, source = request.model_id, self.engine.at(request.path, "weights")
        work = lambda: self.engine.load(model_id, source, optimizer=request.optimizer)  # noqa: E731
        return self._in_turn("load_weights", model_id, request.seq_id, work, http)

    # Saving and sampling

    def save_weights(self, body: Json, http: HttpRequest) -> Json:
        request = types.SaveWeightsRequest.model_validate(body)
        model_id, name = request.model_id, request.path or f"step{request.seq_id}"
        self._reserve(model_id, "weights", name, request.seq_id, overwrite=request.overwrite and self.engine.ways.checkpoints_end)
        work = lambda: {"type": "save_weights", "path": self.engine.save(model_id, "weights", name, request.ttl_seconds)}  # noqa: E731
        return self._in_turn("save_weights", model_id, request.seq_id, work, http)

    def save_weights_for_sampler(self, body: Json, http: HttpRequest) -> Json:
        request = types.SaveWeightsForSamplerRequest.model_validate(body)
        model_id, name = request.model_id, request.path or f"ss{request.sampling_session_seq_id}_seq{request.seq_id}"
        self._reserve(model_id, "sampler_weights", name, request.seq_id, overwrite=False)

        def work() -> Json:
            path = self.engine.save(model_id, "sampler_weights", name, request.ttl_seconds)
            answer: Json = {"type": "save_weights_for_sampler", "path": path}
            return answer if request.path else answer | {"path": None, "sampling_session_id": self._new_sampler(path)}

        return self._in_turn("save_weights_for_sampler", model_id, request.seq_id, work, http)

    def asample(self, body: Json, http: HttpRequest) -> Json:
        request = types.SampleRequest.model_validate(body)
        if request.sampling_params.max_tokens is None and not self.engine.ways.knows_models:
            raise Refused(400, "max_tokens is currently required")
        session = request.sampling_session_id
        sampler = self._sampler(session) if session else request.model_path or request.base_model or ""
        if sampler.startswith("tinker://"):
            self.engine.at(sampler, "sampler_weights")
        once = f"{session}:{request.seq_id}" if session else None
        return {"request_id": self._submit("asample", lambda: self.engine.sample(sampler, request), http, once=once, model_id=None)}

    # Checkpoints

    def weights_info(self, body: Json, http: HttpRequest) -> Json:
        run = self.engine.at(body["tinker_path"], "weights").run
        info: Json = {"base_model": run.base_model, "is_lora": True, "lora_rank": run.lora.rank}
        trained = {"train_unembed": run.lora.train_unembed, "train_mlp": run.lora.train_mlp, "train_attn": run.lora.train_attn}
        return info | (trained if self.engine.ways.knows_models else {})

    def checkpoints(self, body: Json, http: HttpRequest) -> Json:
        run = http.path_params["run"]
        return {"checkpoints": [self._listed(found) for found in self._alive() if found.run.model_id == run]}

    def all_checkpoints(self, body: Json, http: HttpRequest) -> Json:
        offset, limit = int(http.query_params.get("offset", 0)), int(http.query_params.get("limit", 100))
        listed = [self._listed(found) for found in reversed(self._alive())]
        cursor = {"offset": offset, "limit": limit, "total_count": len(listed)}
        return {"checkpoints": listed[offset : offset + limit], "cursor": cursor}

    def delete_checkpoint(self, body: Json, http: HttpRequest) -> Response:
        run, kind, name = self._named(http)
        self.engine.delete(run, kind, name)
        self._names.discard((run, kind, name))
        return Response(status_code=204)

    def set_ttl(self, body: Json, http: HttpRequest) -> Response:
        found, ttl = self.engine.checkpoint(*self._named(http)), body["ttl_seconds"]
        if ttl is not None and ttl <= 0:
            raise Refused(400, "ttl_seconds must be positive")
        found.expires = None if ttl is None else self.engine.now() + ttl
        return Response(status_code=204)

    def archive(self, body: Json, http: HttpRequest) -> Response:
        self.engine.checkpoint(*self._named(http))
        where = str(http.url).removesuffix("archive") + "download"
        return Response(status_code=302, headers={"location": where, "expires": formatdate(self.engine.now() + 900, usegmt=True)})

    def download(self, body: Json, http: HttpRequest) -> Response:
        return Response(self.engine.archive(*self._named(http)), media_type="application/octet-stream")

    # Between them

    def _in_turn(self, name: str, model_id: str, seq_id: int | None, work: Callable[[], Json], http: HttpRequest) -> Json:
        self.engine.run(model_id)
        if self.engine.ways.once and seq_id is not None:
            last = self._seq.get(model_id, 0)
            if seq_id > last + 1:
                self.engine.violations.append(f"{model_id}: request {seq_id} ({name}) came after {last}")
            self._seq[model_id] = max(last, seq_id)
        once = f"{model_id}:{seq_id}" if seq_id is not None else None
        return {"request_id": self._submit(name, work, http, once=once, model_id=model_id), "model_id": model_id}

    def _reserve(self, model_id: str, kind: Kind, name: str, seq_id: int | None, *, overwrite: bool) -> None:
        """A name is taken from the moment it is asked for. A request that comes twice is no second one, where that is known."""
        self.engine.run(model_id)
        again = self.engine.ways.once and seq_id is not None and seq_id <= self._seq.get(model_id, 0)
        if (model_id, kind, name) in self._names and not (overwrite or again):
            raise Refused(409, f"Checkpoint '{name}' already exists for model '{model_id}'")
        self._names.add((model_id, kind, name))

    def _known_session(self, session_id: str) -> None:
        if session_id not in self.engine.sessions:
            raise Refused(404, "Session not found")

    def _new_sampler(self, speaks: str) -> str:
        sampler = f"sampling_{next(self._ids):08x}"
        self.engine.samplers[sampler] = speaks
        return sampler

    def _sampler(self, sampler: str) -> str:
        if sampler not in self.engine.samplers:
            raise Refused(404, "Sampling session not found")
        return self.engine.samplers[sampler]

    def _named(self, http: HttpRequest) -> tuple[str, Kind, str]:
        """The run, kind and name in the URL."""
        kind, _, name = http.path_params["name"].rpartition("/")
        if not self.engine.ways.kinds and not kind:
            kind = "sampler_weights"
        if kind not in ("weights", "sampler_weights"):
            raise Refused(400 if self.engine.ways.kinds else 404, "Not Found")
        return http.path_params["run"], kind, name

    def _alive(self) -> list[Checkpoint]:
        now = self.engine.now()
        return [found for found in self.engine.checkpoints.values() if found.expires is None or found.expires > now]

    def _listed(self, found: Checkpoint) -> Json:
        kind = "training" if found.kind == "weights" else "sampler"
        name = f"{found.kind}/{found.name}" if self.engine.ways.kinds else found.name
        base: Json = {"checkpoint_id": name, "checkpoint_type": kind, "time": _iso(found.created), "tinker_path": found.path}
        if not self.engine.ways.checkpoints_end:
            return base
        size = sum(p.numel() * 4 for p in found.lora.values())
        return base | {"size_bytes": size, "public": False, "expires_at": _iso(found.expires) if found.expires is not None else None}


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
