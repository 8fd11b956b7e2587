"""`claas serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from claas.cli.options import DataDir, Mode, VllmUrl


def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind. Anything but loopback needs CLAAS_API_KEYS.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 0 takes a free one.", min=0, max=65535)] = None,
    data_dir: DataDir = None,
    mode: Mode = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id or local folder.")] = None,
    vllm_url: VllmUrl = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every request.")] = False,
) -> None:
    """Start the service.

    --mode modal needs an app on Modal: 'claas modal deploy' makes it.

    What is not said here comes from the CLAAS_... variables, the file that CLAAS_CONFIG names, or the defaults: see docs/settings.md.
    """
    import sys
    from contextlib import closing
    from functools import partial

    from claas.cli import server
    from claas.core.settings import load_settings
    from claas.services import Services
    from claas.wiring import open_services

    server.quieten(verbose=verbose)
    settings = load_settings(
        host=host, port=port, data_dir=data_dir, distill_execution_mode=mode, base_model_id=base_model, vllm_base_url=vllm_url
    )
    with closing(server.bind(settings.host, settings.port)) as sock:

        def on_ready(_: server.Server, services: Services) -> None:
            url = server.url_of(sock)
            typer.echo(f"CLaaS listens on {url} (Ctrl-C stops it)")
            for label, line in server.hint(url, services).items():
                typer.echo(f"  {label:8}{line}")

        server.run(settings, partial(open_services, progress=sys.stderr.isatty()), sock, on_ready, verbose=verbose)
    typer.echo("Stopped.")
