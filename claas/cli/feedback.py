"""`claas feedback`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from claas.cli.options import DEFAULT_URL, ApiKey, AsJson, Url


def feedback(
    completion_id: Annotated[str, typer.Argument(help="The id a reply was answered with.")],
    text: Annotated[str | None, typer.Argument(help="What was wrong or right with it.")] = None,
    good: Annotated[bool | None, typer.Option("--good/--bad", help="Rate it, with or without words.", show_default=False)] = None,
    demonstration: Annotated[str | None, typer.Option(help="The reply that was wanted.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Also show a new reply to the same prompt.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Say what was wrong or right with a reply: one lesson.

    In words, as a rating, or by the reply that was wanted. Exit code 1 if nothing was learnt.
    """
    if text is None and good is None and demonstration is None:
        raise typer.BadParameter("say TEXT, --good, --bad or --demonstration")
    from claas.cli.client import Client
    from claas.cli.report import Step

    with Client(url, api_key) as client:
        rating = None if good is None else 1 if good else -1
        answer = client.feedback([completion_id], text, rating=rating, demonstration=demonstration, show=show)
    step = Step.of(answer)
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        typer.echo("\n".join([step.headline(), *step.remarks(), step.figures()]))
        for shown in answer["shown"]:
            typer.echo(f"\n> {shown['prompt']}\nbefore: {shown['before']}\nafter:  {shown['after']}")
    if not step.applied:
        raise typer.Exit(1)
