"""`claas teach`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from claas.cli.options import ApiKey, AsJson, MaxTokens


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise typer.BadParameter(f"{text!r} is no regular expression: {error}") from error


def teach(
    feedback: Annotated[str, typer.Option(help="What the replies should have been like.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Taught on a reply to this; repeatable.")] = None,
    probe: Annotated[list[str] | None, typer.Option(help="Never taught on, asked before and after; repeatable.")] = None,
    unrelated: Annotated[list[str] | None, typer.Option(help="Like --probe, but should stay as it is; repeatable.")] = None,
    expect: Annotated[
        re.Pattern[str] | None, typer.Option(parser=_pattern, metavar="REGEX", help="What a probe's reply should show afterwards.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The adapter that learns. Default: the service's adapter.")] = None,
    rounds: Annotated[int, typer.Option(help="Replies and feedback, at most so often; stops when every probe matches.", min=1)] = 1,
    max_tokens: MaxTokens = 160,
    temperature: Annotated[float, typer.Option(help="Of the replies that are taught on.", min=0.0, max=2.0)] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Repeats the same replies.", min=0)] = None,
    as_json: AsJson = False,
    url: Annotated[
        str | None, typer.Option(envvar="CLAAS_URL", help="The service that learns. Default: one of its own, gone afterwards.")
    ] = None,
    api_key: ApiKey = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Where a service of its own keeps what it learnt. Default: nowhere.", file_okay=False)
    ] = None,
) -> None:
    """Teach one lesson and show what it changed.

    Takes replies to the prompts, says the feedback on all of them at once, and shows greedy replies to the probes from before and after.
    Exit code 1 if nothing was learnt, or the probes show no more of --expect than before.
    """
    if url is not None and data_dir is not None:
        raise typer.BadParameter("--data-dir is for a service of its own, and --url names another: say one of them")
    from contextlib import ExitStack

    from claas.cli import lesson, teach_view

    with ExitStack() as stack:
        client = stack.enter_context(teach_view.service(url, api_key, data_dir, model))
        result = lesson.teach(
            client,
            lesson.Lesson(
                feedback=feedback,
                model=model or client.default_model(),
                prompts=tuple(prompt or lesson.PROMPTS),
                probes=tuple(probe or lesson.PROBES),
                unrelated=tuple(unrelated or ()),
                expect=expect,
                rounds=rounds,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
            ),
            stack.enter_context(teach_view.progress()),
        )
    if as_json:
        typer.echo(json.dumps(result.as_json(), ensure_ascii=False))
    else:
        teach_view.show(result)
    if not result.learnt:
        raise typer.Exit(1)
