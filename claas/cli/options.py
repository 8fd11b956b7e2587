"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DEFAULT_URL = "http://127.0.0.1:8080"

Url = Annotated[str, typer.Option("--url", envvar="CLAAS_URL", help="The service to talk to.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="CLAAS_API_KEY", help="Bearer key, where the service asks for one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Database, adapters and logs.", file_okay=False)]
Mode = Annotated[
    Literal["local", "modal", "tinker"] | None,
    typer.Option("--mode", help="Where lessons are trained: here, on Modal, or on a Tinker server."),
]
VllmUrl = Annotated[str | None, typer.Option("--vllm-url", help="A vLLM that serves the base model, instead of this process.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest reply, in tokens.")]
