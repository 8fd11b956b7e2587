"""What `claas modal` shows: tables, lines, and the same as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from claas.cli.adapters import size_of

if TYPE_CHECKING:
    from claas.cli.modal_cloud import AppState, VolumeState
    from claas.cli.modal_deploy import Key, Planned
    from claas.core.settings import Settings

NEXT = {
    "check": "claas doctor --mode modal",
    "serve": "claas serve --mode modal",
    "look": "claas modal status",
    "logs": "claas modal logs-hint",
}


def plan_table(settings: Settings, planned: Iterable[Planned]) -> Table:
    where = settings.modal_environment or "your default"
    columns = ("", "name", "GPU", "containers", "$ an hour", "")
    title = Text(f"{settings.modal_app}, environment {where!r}; prices are of one container while it runs")
    table = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    for item in planned:
        table.add_row(
            item.kind, Text(item.name), item.gpu or "–", "–" if item.containers is None else f"at most {item.containers}",
            _dollars(item), Text(item.what),
        )  # fmt: skip
    return table


def _dollars(item: Planned) -> str:
    if item.gpu is None:
        return "–"
    return "unknown: see CLAAS_MODAL_PRICES" if item.price is None else f"{item.price:.2f}"


def key_lines(key: Key) -> str:
    if key.done == "set":
        return "vLLM's key is what VLLM_API_KEY says here; the service needs it too."
    if key.done == "kept":
        return "vLLM's key is kept: the service needs it in VLLM_API_KEY. Lost? 'claas modal deploy --new-key' draws another."
    return f"vLLM's key, shown this once; wherever the service runs:\n  export VLLM_API_KEY={key.value}"


def logs_command(settings: Settings) -> str:
    environment = [] if settings.modal_environment is None else ["--env", settings.modal_environment]
    return shlex.join(["modal", "app", "logs", settings.modal_app, "--follow", "--timestamps", *environment])


def as_json(settings: Settings, state: AppState | None, volume: VolumeState | None, worker: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "app": settings.modal_app,
        "deployed": None if state is None else state.as_json(),
        "volume": None if volume is None else asdict(volume),
        "worker": worker,
    }


def status_table(settings: Settings, state: AppState | None, volume: VolumeState | None, worker: dict[str, Any] | None) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("app", Text(_deployment(settings, state)))
    for function in state.functions if state else ():
        waiting = f", {function.waiting} calls wait" if function.waiting else ""
        table.add_row(Text(function.name), Text(f"{function.containers} containers run{waiting}"))
    if volume is None:
        table.add_row("adapters", "none: there is no Volume yet")
    else:
        kept = f"{volume.adapters} with {volume.versions} versions, {size_of(volume.size_bytes)} in {volume.name!r}"
        table.add_row("adapters", Text(kept))
    for label, value in (worker or {}).items():
        table.add_row(Text(f"worker {label}"), Text(str(value)))
    return table


def _deployment(settings: Settings, state: AppState | None) -> str:
    if state is None:
        return f"{settings.modal_app} is not deployed: 'claas modal deploy' does it"
    since = "" if state.deployed_at is None else f" since {state.deployed_at:%Y-%m-%d %H:%M} UTC"
    by = f", by {state.deployed_by}" if state.deployed_by else ""
    return f"{settings.modal_app} is deployed{since}, version {state.version}{by}"
