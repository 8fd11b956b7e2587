"""Reads the repository's pages: sections, tables and fenced blocks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def sections(page: Path) -> dict[str, str]:
    """Heading (of the second level) → the text under it."""
    parts = re.split(r"^## (.+)$", page.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, headings left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    rulers = {number for number, cells in enumerate(split) if set("".join(cells)) <= {"-", " ", ":"}}
    return [cells for number, cells in enumerate(split) if number not in rulers and number + 1 not in rulers]


def fenced(page: Path, *languages: str) -> list[str]:
    """The bodies of the fenced blocks in one of these languages."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [body for language, body in blocks if language in languages]


def commands(page: Path) -> list[str]:
    """The lines of the shell blocks, with continuation lines put together; comments and blank lines left out."""
    lines = [line for block in fenced(page, "sh", "bash", "shell") for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
