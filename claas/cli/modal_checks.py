"""What `claas doctor` looks at on Modal. Only asks, and starts no container: a vLLM that does not run is not called."""

from __future__ import annotations

from collections.abc import Iterator

import httpx

from claas.adapters.modal_errors import NO_TOKEN
from claas.cli.findings import Finding
from claas.cli.modal_cloud import SERVER, WORKER, AppState, app_state, vllm_key, vllm_url, volume_state
from claas.core.errors import ClaasError
from claas.core.modal_prices import price_per_second
from claas.core.settings import Settings
from claas.training.engine.modal_wire import tags_of

TIMEOUT_S = 30.0
DEPLOY = "run 'claas modal deploy'"


def check_modal(settings: Settings) -> Iterator[Finding]:
    """The app that the settings name: the first thing that keeps Modal from being asked further is the last finding."""
    yield check_price(settings)
    try:
        state = app_state(settings)
        yield Finding("modal token", "ok", "taken")
        if state is None:
            yield Finding("modal app", "fail", f"there is no app {settings.modal_app!r}: {DEPLOY}")
            return
        yield Finding("modal app", "ok", f"{state.app} is deployed, version {state.version}")
        yield check_worker(settings, state)
        yield check_volume(settings)
        if settings.modal_serving == "vllm":
            yield check_vllm_server(settings, state)
    except ClaasError as error:
        yield Finding("modal token" if error.message == NO_TOKEN else "modal", "fail", error.message)


def check_price(settings: Settings) -> Finding:
    gpus = [settings.modal_gpu, *([settings.modal_vllm_gpu] if settings.modal_serving == "vllm" else [])]
    unknown = sorted({gpu for gpu in gpus if price_per_second(settings, gpu) is None})
    if unknown:
        return Finding("modal price", "warn", f"no price is known of {', '.join(unknown)}: CLAAS_MODAL_PRICES sets it, dollars a second")
    told = ", ".join(f"{gpu} {3600 * (price_per_second(settings, gpu) or 0):.2f}" for gpu in dict.fromkeys(gpus))
    return Finding("modal price", "ok", f"dollars an hour: {told}")


def check_worker(settings: Settings, state: AppState) -> Finding:
    """Whether it was deployed by this version with these settings, which its tags tell."""
    if WORKER not in {function.name for function in state.functions}:
        return Finding("modal worker", "fail", f"the app {state.app!r} has no {WORKER}, so it is not CLaaS's: set CLAAS_MODAL_APP")
    wanted, there = tags_of(settings), state.tags
    other = [f"{name} {there.get(name, 'unknown')} instead of {value}" for name, value in wanted.items() if there.get(name) != value]
    if other:
        return Finding("modal worker", "fail", f"deployed with {', '.join(other)}: {DEPLOY}")
    return Finding("modal worker", "ok", ", ".join(wanted.values()))


def check_volume(settings: Settings) -> Finding:
    volume = volume_state(settings)
    if volume is None:
        return Finding("modal adapters", "fail", f"their Volume is not there: {DEPLOY}")
    return Finding("modal adapters", "ok", f"{volume.adapters} adapters, {volume.versions} versions")


def check_vllm_server(settings: Settings, state: AppState) -> Finding:
    running = {function.name: function.containers for function in state.functions}
    if SERVER not in running:
        return Finding("modal vllm", "fail", f"the app was deployed without vLLM: {DEPLOY}, or set CLAAS_MODAL_SERVING=embedded")
    key = vllm_key(settings)
    if key is None:
        return Finding("modal vllm", "fail", "VLLM_API_KEY is not set: 'claas modal deploy' showed it, its --new-key draws another")
    if not running[SERVER]:
        return Finding("modal vllm", "ok", "no container runs: the first reply waits for one")
    try:
        headers = {"authorization": f"Bearer {key}"}
        status = httpx.get(f"{vllm_url(settings)}/health", headers=headers, timeout=TIMEOUT_S).status_code
    except httpx.HTTPError as error:
        return Finding("modal vllm", "warn", f"runs, and does not answer ({type(error).__name__}): it may be starting")
    if status == 401:
        return Finding("modal vllm", "fail", "refuses the key: set VLLM_API_KEY to the one that 'claas modal deploy' showed")
    if status != 200:
        return Finding("modal vllm", "warn", f"runs, and answers {status}: it may be starting; 'claas modal logs-hint' shows where to look")
    return Finding("modal vllm", "ok", "runs, and is well")
