"""`claas doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from claas.cli.options import AsJson, DataDir, Mode, VllmUrl

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    host: Annotated[str | None, typer.Option(help="As for serve.")] = None,
    port: Annotated[int | None, typer.Option(help="As for serve.", min=0, max=65535)] = None,
    data_dir: DataDir = None,
    base_model: Annotated[str | None, typer.Option(help="As for serve.")] = None,
    mode: Mode = None,
    vllm_url: VllmUrl = None,
    as_json: AsJson = False,
) -> None:
    """Check whether the service would work here.

    Says what to do where it would not. Exit code 1 if something fails.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from claas.cli.checks import check_all

    findings = list(
        check_all(host=host, port=port, data_dir=data_dir, distill_execution_mode=mode, base_model_id=base_model, vllm_base_url=vllm_url)
    )
    if as_json:
        typer.echo(json.dumps({finding.part: {"status": finding.status, "detail": finding.detail} for finding in findings}))
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            table.add_row(Text(finding.status, STYLES[finding.status]), finding.part, Text(finding.detail))
        Console(highlight=False).print(table)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)
