"""What `claas teach` shows, and the service it makes for itself where none is named."""

from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from claas.cli.client import Client
from claas.cli.lesson import Observe, Result
from claas.core.settings import load_settings

SHOWN_CHARS = 240  # of a reply; --json has all of it


@contextmanager
def service(url: str | None, api_key: str | None, data_dir: Path | None, model: str | None) -> Iterator[Client]:
    """The service at `url`, or one in this process that keeps its data in `data_dir` or forgets it."""
    if url is not None:
        with Client(url, api_key) as client:
            yield client
        return
    from claas.cli.server import in_background, quieten
    from claas.wiring import open_services

    quieten(verbose=False)
    with nullcontext(data_dir) if data_dir else tempfile.TemporaryDirectory(prefix="claas-", ignore_cleanup_errors=True) as folder:
        home, key = Path(folder), secrets.token_urlsafe()
        settings = load_settings(
            host="127.0.0.1",
            port=0,
            api_keys=(key,),
            data_dir=home,
            lora_root=home / "adapters",
            feedback_log_dir=home / "feedback",
            database_url=f"sqlite:///{home / 'claas.db'}",
            default_adapter=model,
        )
        with in_background(settings, partial(open_services, progress=sys.stderr.isatty())) as own, Client(own, key) as client:
            yield client


@contextmanager
def progress() -> Iterator[Observe]:
    """Bars and spinners on standard error; nothing where that is no terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        @contextmanager
        def observe(what: str, total: int) -> Iterator[Callable[[], None]]:
            task = bars.add_task(what, total=total or None)
            try:
                yield lambda: bars.advance(task)
            finally:
                bars.remove_task(task)

        yield observe


def show(result: Result) -> None:
    """The probes before and after, side by side, and the learning figures."""
    console = Console(highlight=False)
    lesson, total = result.lesson, len(result.probes)
    table = Table("never taught on", "before", "after", title=Text(f"“{lesson.feedback}”"), show_lines=True, expand=True)
    for answer in result.probes:
        table.add_row(Text(answer.question), *(_reply(text, lesson.matches(text)) for text in (answer.before, answer.after)))
    for answer in result.unrelated:
        table.add_row(Text(f"{answer.question} (unrelated)", style="dim"), _reply(answer.before), _reply(answer.after))
    console.print(table)
    for number, one in enumerate(result.rounds, start=1):
        _line(console, f"round {number}: {one.step.headline()}", "green" if one.step.applied else "yellow")
        for remark in one.step.remarks():
            _line(console, f"  {remark}", "yellow")
        _line(console, f"  {one.step.figures()}", "dim")
        if lesson.expect is not None:
            _line(console, f"  {one.matched} of {total} probes match", "dim")
        for prompt in one.cut_off:
            _line(console, f"  not taught on, its reply did not end by itself: {prompt}", "yellow")
    if lesson.expect is not None:
        counts = f"{result.matched_before} of {total} probes before, {result.matched_after} of {total} after"
        _line(console, f"{lesson.expect.pattern!r}: {counts}", "bold green" if result.learnt else "bold red")
    _line(console, f"{result.seconds:.0f} s in all", "dim")


def _reply(text: str, matches: bool = False) -> Text:
    short = text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS].rstrip() + " …"
    return Text(short, style="green" if matches else "")


def _line(console: Console, text: str, style: str) -> None:
    console.print(Text(text, style=style), soft_wrap=True)
