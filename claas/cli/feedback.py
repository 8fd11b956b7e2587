"""`claas feedback`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from claas.cli.options import DEFAULT_URL, ApiKey, AsJson, Url


def feedback(
    completion_id: Annotated[str, typer.Argument(help="The id a reply was answered with.")],
    text: Annotated[str, typer.Argument(help="What was wrong or right with it.")],
    show: Annotated[bool, typer.Option("--show", help="Also show a new reply to the same prompt.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Say what was wrong with a reply: one lesson.

    Exit code 1 if nothing was learnt.
    """
    from claas.cli.client import Client
    from claas.cli.report import Step

    with Client(url, api_key) as client:
        answer = client.feedback([completion_id], text, show=show)
    step = Step.of(answer)
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        typer.echo(f"{step.headline()}\n{step.figures()}")
        for shown in answer["shown"]:
            typer.echo(f"\n> {shown['prompt']}\nbefore: {shown['before']}\nafter:  {shown['after']}")
    if not step.applied:
        raise typer.Exit(1)
