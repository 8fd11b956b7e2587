"""What `claas teach` shows, and the service it makes for itself where none is named."""

from __future__ import annotations

import secrets
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
from claas.cli.lesson import Answer, Observe, Result
from claas.core.settings import load_settings


@contextmanager
def service(url: str | None, api_key: str | None, data_dir: Path | None, model: str | None) -> Iterator[Client]:
    """The service at `url`, or one in this process that keeps its data in `data_dir` or forgets it."""
    if url is not None:
        with Client(url, api_key) as client:
            yield client
        return
    from claas.cli.server import in_background
    from claas.wiring import open_services

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
        with in_background(settings, partial(open_services, progress=True)) as own, Client(own, key) as client:
            yield client


@contextmanager
def progress() -> Iterator[Observe]:
    """Bars and spinners on standard error; nothing where that is no terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        @contextmanager
        def observe(what: str, total: int) -> Iterator[Callable[[], None]]:
            task = bars.add_task(what, total=total or None)
            try:
                yield lambda: bars.advance(task)
            finally:
                bars.remove_task(task)

        yield observe


def show(result: Result, console: Console | None = None) -> None:
    """The probes before and after, side by side, and the learning figures."""
    console = console or Console(highlight=False)
    lesson = result.lesson
    table = Table("probe (never taught on)", "before", "after", title=Text(f"“{lesson.feedback}”"), show_lines=True, expand=True)
    for answer in result.probes:
        table.add_row(*_row(answer, result))
    if result.unrelated:
        table.add_section()
        for answer in result.unrelated:
            table.add_row(Text(f"{answer.question} (unrelated)"), Text(answer.before), Text(answer.after))
    console.print(table)
    for number, one in enumerate(result.rounds, start=1):
        console.print(Text(f"round {number}: {one.step.headline()}", style="green" if one.step.applied else "yellow"))
        console.print(Text(f"         {one.step.figures()}", style="dim"))
        for prompt in one.cut_off:
            console.print(Text(f"         not taught on, its reply did not end by itself: {prompt}", style="yellow"))
    if lesson.expect is not None:
        total = len(result.probes)
        console.print(
            Text(f"{lesson.expect.pattern!r}: {result.matched_before} of {total} probes before, {result.matched_after} of {total} after"),
            style="bold green" if result.learnt else "bold red",
        )
    console.print(Text(f"{result.seconds:.0f} s in all", style="dim"))


def _row(answer: Answer, result: Result) -> tuple[Text, Text, Text]:
    def reply(text: str) -> Text:
        return Text(text, style="green" if result.matches(text) else "")

    return Text(answer.question), reply(answer.before), reply(answer.after)
