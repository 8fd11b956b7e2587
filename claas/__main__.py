"""`python -m claas` and the `claas` command."""

from __future__ import annotations

from claas.cli.main import app


def main() -> None:
    app(prog_name="claas")


if __name__ == "__main__":
    main()
