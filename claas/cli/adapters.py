"""`claas adapters`: list, versions, init, rollback, export, import, delete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from claas.cli.options import DEFAULT_URL, ApiKey, AsJson, Url

app = typer.Typer(name="adapters", no_args_is_help=True, rich_markup_mode="rich", help="Adapters and their versions.")

LoraId = Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter's id.")]


@app.command("list")
def list_(
    prefix: Annotated[str, typer.Argument(help="Only ids that begin so.")] = "",
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List the adapters."""
    from claas.cli.client import Client

    with Client(url, api_key) as client:
        adapters = client.adapters(prefix)
    plain = "\n".join(adapters) or "There are none: 'claas adapters init NAME' creates one."
    typer.echo(json.dumps({"loras": adapters}) if as_json else plain)


@app.command()
def versions(lora_id: LoraId, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show an adapter's history; the arrow marks the version that serves."""
    from rich.console import Console

    from claas.cli.client import Client

    with Client(url, api_key) as client:
        history = client.versions(lora_id)
    if as_json:
        typer.echo(json.dumps(history))
    else:
        Console().print(table_of(history))


@app.command()
def init(
    lora_id: LoraId,
    rank: Annotated[int | None, typer.Option(help="LoRA rank; the default suits the model's size.", min=1, max=256)] = None,
    alpha: Annotated[int | None, typer.Option(help="LoRA alpha; the default suits the model's size.", min=1, max=1024)] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Create an adapter; until it is taught it answers as the base model does."""
    from claas.cli.client import Client

    with Client(url, api_key) as client:
        created = client.init(lora_id, lora_r=rank, lora_alpha=alpha)
    typer.echo(f"{created['lora_id']} created at version {created['version']}")


@app.command()
def rollback(
    lora_id: LoraId,
    version: Annotated[int, typer.Argument(help="The version to serve from now on.", min=0)],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Serve another version. The one left stays, so this too can be undone."""
    from claas.cli.client import Client

    with Client(url, api_key) as client:
        now = client.rollback(lora_id, version)
    typer.echo(f"{now['lora_id']} serves version {now['version']}")


@app.command()
def export(
    lora_id: LoraId,
    file: Annotated[Path | None, typer.Argument(help="Where to write the zip; default: the adapter's name here.", dir_okay=False)] = None,
    version: Annotated[int | None, typer.Option(help="Default: the version that serves.", min=0)] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Write an adapter to a zip that PEFT and vLLM load."""
    from claas.cli.client import Client

    target = file or Path(lora_id.replace("/", "~") + ("" if version is None else f"@{version}") + ".zip")
    if target.exists() and not force:
        raise typer.BadParameter(f"{target} exists: say --force to overwrite it")
    with Client(url, api_key) as client:
        archive = client.export(lora_id, version)
    try:
        target.write_bytes(archive)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {target}: {error.strerror}") from error
    typer.echo(f"{target}: {size_of(len(archive))}")


@app.command("import")
def import_(
    lora_id: LoraId,
    file: Annotated[Path, typer.Argument(help="A zip in PEFT's layout.", exists=True, dir_okay=False, readable=True)],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Create an adapter from a zip in PEFT's layout."""
    from claas.cli.client import Client

    with Client(url, api_key) as client:
        created = client.import_(lora_id, file.read_bytes())
    typer.echo(f"{created['lora_id']} created at version {created['version']}")


@app.command()
def delete(
    lora_id: LoraId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Remove an adapter with all its versions, replies and feedback. Cannot be undone."""
    from claas.cli.client import Client

    if not yes:
        typer.confirm(f"Delete {lora_id!r} with all its versions, replies and feedback?", abort=True)
    with Client(url, api_key) as client:
        client.delete(lora_id)
    typer.echo(f"{lora_id} deleted")


def table_of(history: dict[str, Any]) -> Any:
    """An adapter's versions as a Rich table."""
    from rich.table import Table
    from rich.text import Text

    columns = ("", "version", "parent", "made", "lessons", "size")
    table = Table(*columns, title=Text(history["lora_id"]), title_justify="left", box=None, pad_edge=False)
    for item in history["versions"]:
        table.add_row(
            "→" if item["version"] == history["latest"] else "",
            str(item["version"]),
            "–" if item["parent"] is None else str(item["parent"]),
            item["created_at"][:19].replace("T", " "),
            str(len(item["feedback_ids"])),
            size_of(item["size_bytes"]),
        )
    return table


def size_of(n_bytes: int) -> str:
    """A number of bytes for people."""
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:.1f} KiB"
