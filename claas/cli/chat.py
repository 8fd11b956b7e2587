"""`claas chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from claas.cli.options import DEFAULT_URL, ApiKey, MaxTokens, Url


def chat(
    model: Annotated[str | None, typer.Option(help="Adapter, adapter@version or base model. Default: the service's adapter.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0.0, max=2.0)] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Repeats the same replies.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Chat with the service, and teach it.

    /feedback TEXT says what was wrong with the last reply, /wanted TEXT what it should have been, /good and /bad rate it; what was learnt
    shows at once. Ctrl-C stops a reply; /help lists the rest.
    """
    from rich.console import Console

    from claas.cli.client import Client
    from claas.cli.repl import Repl

    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - input() gets line editing and a history
    with Client(url, api_key) as client:
        sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        Repl(client, Console(soft_wrap=True, highlight=False), model or client.default_model(), sampling, system, interactive).run()
