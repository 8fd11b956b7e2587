"""Sends what a documented curl command would send, where there may be no curl."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import httpx


def curl(command: str, folder: Path, **headers: str) -> httpx.Response:
    """Run it with `headers` added, files being those of `folder`. An option that no page uses is an error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-X", dest="method")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("-d", dest="data")
    parser.add_argument("--data-binary", dest="binary")
    parser.add_argument("-o", dest="output")
    name, *arguments = shlex.split(command)
    assert name == "curl"
    asked = parser.parse_args(arguments)
    body = asked.data.encode() if asked.data else (folder / asked.binary.removeprefix("@")).read_bytes() if asked.binary else None
    sent = dict(header.split(": ", 1) for header in asked.headers) | headers
    response = httpx.request(asked.method or ("GET" if body is None else "POST"), asked.url, headers=sent, content=body, timeout=60)
    if asked.output:
        (folder / asked.output).write_bytes(response.content)
    return response
