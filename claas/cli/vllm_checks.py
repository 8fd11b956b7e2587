"""What `claas doctor` looks at in a vLLM that is to serve. Only asks: nothing is loaded, paused or woken."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from claas.cli.findings import Finding
from claas.core.settings import LOOPBACK_HOSTS, Settings

FLOOR = (0, 31)
TESTED = "0.32.0"
TIMEOUT_S = 30.0  # the first answer to /server_info describes the whole machine
LOADING = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
CONTROL = {"/pause", "/resume", "/sleep", "/wake_up", "/is_sleeping", "/release_kv_cache_memory"}
HOW = "scripts/start-vllm starts one as it should be"


def check_vllm(settings: Settings, url: str) -> Iterator[Finding]:
    """The vLLM at `url`: the first thing that keeps it from being asked further is the last finding."""
    key = settings.vllm_api_key.get_secret_value() if settings.vllm_api_key else ""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(TIMEOUT_S, connect=5.0), trust_env=False) as vllm:
            yield from _ask(vllm, settings, url)
    except (httpx.ConnectError, httpx.ConnectTimeout):
        yield Finding("vllm", "fail", f"none answers at {url}: {HOW}; or set VLLM_BASE_URL to where it listens")
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        yield Finding("vllm", "fail", f"what answers at {url} is no vLLM, or an unwell one ({type(error).__name__}): look into its log")


def _ask(vllm: httpx.Client, settings: Settings, url: str) -> Iterator[Finding]:
    yield check_version(_json(vllm, "/version")["version"], url)
    if vllm.get("/v1/models").status_code == 401:
        yield Finding("vllm key", "fail", "vLLM refuses the key: set VLLM_API_KEY to the one that it was started with")
        return
    yield check_served(_json(vllm, "/v1/models")["data"], settings)
    paths = set(_json(vllm, "/openapi.json")["paths"])
    yield check_paths("vllm adapters", LOADING - paths, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "loads adapters while it runs")
    yield check_control(settings, CONTROL - paths)
    if paths >= CONTROL:
        yield from check_config(settings, _json(vllm, "/server_info?config_format=json"))
        yield check_awake(_json(vllm, "/is_sleeping")["is_sleeping"])
    yield check_adapters_folder(settings, url)


def check_version(version: str, url: str) -> Finding:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return Finding("vllm", "warn", f"version {version!r} at {url} is none that was released: {TESTED} is the one that was tested")
    if (int(numbers[1]), int(numbers[2])) < FLOOR:
        return Finding("vllm", "fail", f"{version} at {url} is older than 0.31: pip install vllm=={TESTED}")
    return Finding("vllm", "ok", f"{version} at {url}")


def check_served(cards: Sequence[Mapping[str, Any]], settings: Settings) -> Finding:
    """Whether the base model is in `cards`, vLLM's list of models, under whatever name. The service compares how both read text."""
    from claas.models.default_model import DEFAULT_MODEL_ID, SMOLLM2

    wanted = settings.base_model_id or DEFAULT_MODEL_ID
    folder = Path(settings.base_model_id or settings.cache_dir / SMOLLM2.folder).resolve()
    for card in cards:
        if card["parent"] is None and (wanted in (card["id"], card["root"]) or Path(card["root"]).resolve() == folder):
            return Finding("vllm model", "ok", f"serves {wanted} as {card['id']!r}")
    served = ", ".join(repr(card["id"]) for card in cards if card["parent"] is None)
    told = f"serves {served}: unless that is {wanted} by another name, start it with that model, or name its own in CLAAS_BASE_MODEL_ID"
    return Finding("vllm model", "warn", told)


def check_paths(part: str, missing: set[str], variable: str, otherwise: str) -> Finding:
    if missing:
        return Finding(part, "fail", f"{', '.join(sorted(missing))} missing: start it with {variable} in its environment")
    return Finding(part, "ok", otherwise)


def check_control(settings: Settings, missing: set[str]) -> Finding:
    if missing and settings.vllm_release == "none":
        return Finding("vllm control", "ok", "has no control endpoints, and 'none' does without")
    return check_paths("vllm control", missing, "VLLM_SERVER_DEV_MODE=1", "can make room for a step; keep its address private")


def check_config(settings: Settings, info: Mapping[str, Any]) -> Iterator[Finding]:
    """What only vLLM's own view of its flags tells. It is for developers, so another version may tell it otherwise."""
    try:
        config = info["vllm_config"]
        yield check_lora(settings, config["lora_config"])
        yield check_sleep_mode(settings, config)
    except (KeyError, TypeError):
        yield Finding("vllm flags", "warn", f"this version tells them otherwise than {TESTED}, so they were not checked: {HOW}")


def check_lora(settings: Settings, config: Mapping[str, Any] | None) -> Finding:
    """`config` is vLLM's own, None if it was started without adapters."""
    if config is None:
        return Finding("vllm lora", "fail", f"adapters are off: start it with --enable-lora; {HOW}")
    rank, loras, layers = config["max_lora_rank"], config["max_loras"], config["target_modules"]
    if layers is None or "lm_head" in layers:
        told = "lm_head may carry an adapter, on which scoring can end vLLM: start it with --lora-target-modules and no lm_head in it"
        return Finding("vllm lora", "warn", f"{told}; {HOW}")
    if loras < 2:
        return Finding("vllm lora", "warn", f"{loras} adapter at a time: start it with --max-loras 2 or more, for two versions in turn")
    if (kept := config["max_cpu_loras"]) < settings.vllm_max_adapters:
        told = f"keeps {kept} adapters and is to know {settings.vllm_max_adapters}: the others are read from disk while every reply waits"
        return Finding("vllm lora", "warn", f"{told}; start it with --max-cpu-loras {settings.vllm_max_adapters}")
    return Finding("vllm lora", "ok", f"{loras} adapters in a batch, rank {rank} at most, on {', '.join(layers)} and no other layers")


def check_sleep_mode(settings: Settings, config: Mapping[str, Any]) -> Finding:
    """`config` is vLLM's own. Only a GPU has memory to give back, and without sleep mode not even the KV cache's."""
    policy = settings.vllm_release
    if config["device_config"]["device"] == "cpu":
        if policy in ("kv_release", "sleep"):
            told = f"on a CPU, which has no memory to give back: {policy!r} shuts the gate for nothing; set CLAAS_VLLM_RELEASE=auto or none"
            return Finding("vllm sleep", "fail" if policy == "kv_release" else "warn", told)
        return Finding("vllm sleep", "ok", "on a CPU, which has no memory to give back")
    if config["model_config"]["enable_sleep_mode"]:
        return Finding("vllm sleep", "ok", "sleep mode is on")
    if policy == "none":
        return Finding("vllm sleep", "ok", "sleep mode is off, and 'none' does without")
    told = f"sleep mode is off, and without it {policy!r} frees nothing: start it with --enable-sleep-mode"
    return Finding("vllm sleep", "fail", f"{told}, or, where a step fits beside it, set CLAAS_VLLM_RELEASE=none")


def check_awake(sleeping: bool) -> Finding:
    if sleeping:
        return Finding("vllm state", "warn", "asleep or paused: the service that uses it is learning, or else wakes it when it starts")
    return Finding("vllm state", "ok", "awake")


def check_adapters_folder(settings: Settings, url: str) -> Finding:
    """Cannot be seen from outside: only loading an adapter shows it, which the start of the service does."""
    here, there = settings.adapters_dir, settings.vllm_lora_root
    seen = f"vLLM must see {here} " + (f"as {there}" if there else "under the same path")
    told = f"{seen}: the start of the service loads an adapter from there, and says so if it cannot"
    if there is None and urlsplit(url).hostname not in LOOPBACK_HOSTS:
        return Finding("vllm folder", "warn", f"{told}; where it is mounted elsewhere, set CLAAS_VLLM_LORA_ROOT")
    return Finding("vllm folder", "ok", told)


def _json(vllm: httpx.Client, path: str) -> Any:
    return vllm.get(path).raise_for_status().json()
