"""`claas retract`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from claas.cli.options import DEFAULT_URL, ApiKey, Url

POLL_S = 0.5


def retract(
    feedback_id: Annotated[str, typer.Argument(help="The id that the lesson's feedback was answered with.")],
    wait: Annotated[bool, typer.Option(help="Wait until the adapter without the lesson serves.")] = True,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Take one lesson back and keep the others: what was learnt since is learnt again without it.

    Exit code 1 if it could not be retracted.
    """
    from claas.cli.client import Client

    with Client(url, api_key) as client:
        row = client.retract(feedback_id)
        while wait and row["state"] == "applied" and not row["reason"]:
            time.sleep(POLL_S)
            row = client.feedback_state(feedback_id)
    done = row["state"] == "retracted"
    typer.echo(row["reason"] or ("retracted" if done else "under way: the lesson still serves until the adapter without it is ready"))
    if wait and not done:
        raise typer.Exit(1)
