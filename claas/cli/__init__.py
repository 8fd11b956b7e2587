"""The command line. But for `serve` and `doctor` it talks HTTP only.

Modules with commands import nothing heavier than Typer at the top: `claas --help` must be instant.
"""
