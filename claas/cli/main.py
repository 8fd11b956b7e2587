"""The `claas` command: its subcommands, and errors in one line."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from claas import __version__
from claas.cli import adapters, chat, doctor, feedback, modal, retract, serve, teach
from claas.core.errors import ClaasError, ConfigurationError


class _OneLineErrors(TyperGroup):
    """What CLaaS raises on purpose is a message for the person, not a traceback: exit 1, or 2 for a wrong setting."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ClaasError as error:
            typer.secho(f"claas: {error.message}", err=True, fg="red")
            raise typer.Exit(2 if isinstance(error, ConfigurationError) else 1) from error


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Continual learning as a service: chat with a model, say what was wrong, and it has learnt it.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"claas {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


app.command()(serve.serve)
app.command()(chat.chat)
app.command()(feedback.feedback)
app.command()(retract.retract)
app.command()(teach.teach)
app.add_typer(adapters.app)
app.command()(doctor.doctor)
app.add_typer(modal.app)
