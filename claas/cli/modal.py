"""`claas modal`: deploy, status, logs-hint, destroy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from claas.cli.options import AsJson

if TYPE_CHECKING:
    from claas.core.settings import Settings

app = typer.Typer(
    name="modal", no_args_is_help=True, rich_markup_mode="rich", help="The app on Modal that trains lessons, and answers. Costs money."
)


@app.command()
def deploy(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be made, and make nothing.")] = False,
    new_key: Annotated[bool, typer.Option("--new-key", help="Draw another key for vLLM; services with the old one are refused.")] = False,
) -> None:
    """Put the app on Modal, or bring it up to date.

    What it is made of comes from the settings. Nothing runs, or costs, before it is asked for something.
    """
    from rich.console import Console

    from claas.cli import modal_deploy, modal_view

    settings = _settings()
    Console(highlight=False).print(modal_view.plan_table(settings, modal_deploy.plan(settings)))
    if dry_run:
        return
    if settings.modal_serving == "vllm":
        typer.echo(modal_view.key_lines(modal_deploy.make_key(settings, new=new_key)))
    url = modal_deploy.deploy_app(settings)
    typer.echo(f"{settings.modal_app} is deployed: {url}")
    for label, line in modal_view.NEXT.items():
        typer.echo(f"  {label:8}{line}")


@app.command()
def status(
    ask: Annotated[bool, typer.Option("--ask", help="Ask the worker too: starts a GPU container, paid for, if none is free.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is deployed, what runs, and the adapters there.

    Exit code 1 if the app is not deployed.
    """
    from rich.console import Console

    from claas.cli import modal_cloud, modal_view

    settings = _settings()
    state = modal_cloud.app_state(settings)
    volume = modal_cloud.volume_state(settings)
    worker = modal_cloud.ask_worker(settings) if ask and state else None
    if as_json:
        typer.echo(json.dumps(modal_view.as_json(settings, state, volume, worker)))
    else:
        Console(highlight=False).print(modal_view.status_table(settings, state, volume, worker))
    if state is None:
        raise typer.Exit(1)


@app.command("logs-hint")
def logs_hint() -> None:
    """Print the command that shows the app's logs."""
    from claas.cli import modal_view
    from claas.core.settings import load_settings

    typer.echo(modal_view.logs_command(load_settings(distill_execution_mode="modal")))


@app.command()
def destroy(
    adapters: Annotated[bool, typer.Option("--adapters", help="Delete the adapters and all else too, after its name is typed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before the app is stopped.")] = False,
) -> None:
    """Stop the app, and what runs of it. Adapters stay, unless --adapters.

    Lessons that are being trained are lost, their feedback is kept. Deploying again brings everything back.
    """
    from claas.cli import modal_cloud

    settings = _settings()
    name = settings.modal_app
    if adapters and typer.prompt(f"Type {name!r} to delete every adapter of it with all versions") != name:
        raise typer.BadParameter(f"that is not {name!r}: nothing was stopped, nothing deleted")
    if not adapters and not yes:
        typer.confirm(f"Stop {name!r} and all that runs of it?", abort=True)
    stopped = modal_cloud.stop_app(settings)
    typer.echo(f"{name} is stopped" if stopped else f"{name} was not deployed")
    if adapters:
        modal_cloud.delete_everything(settings)
        typer.echo("Its adapters, models, leases and key are deleted")
    else:
        typer.echo(f"Adapters stay in the Volume {modal_cloud.adapters_volume(settings)!r}: 'claas modal destroy --adapters' deletes them")


def _settings() -> Settings:
    """Those of the environment, as the app itself reads them.

    Raises ConfigurationError for a wrong one, and without the SDK.
    """
    from claas.cli.modal_cloud import require_sdk
    from claas.core.settings import load_settings

    require_sdk()
    return load_settings(distill_execution_mode="modal")
