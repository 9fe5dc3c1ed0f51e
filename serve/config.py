"""A TOML file with the options' own names. The command line and the environment win over it; others are errors."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from .settings import Settings

NOT_IN_A_FILE = frozenset({"config", "dry_run", "help"})
PATHS = {field.name for field in fields(Settings) if "Path" in str(field.type)}


def from_file(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of `--config`: makes the file's values the defaults of all other options.

    A relative path in the file starts at the file's folder. Raises BadParameter with the file's name and the reason.
    """
    if path is None:
        return None
    try:
        given = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} cannot be read as TOML: {error}") from None
    options = {str(option.name) for option in context.command.params} - NOT_IN_A_FILE
    values: dict[str, Any] = {}
    for written, value in given.items():
        name = written.replace("-", "_")
        if name not in options:
            raise typer.BadParameter(f"{path}: {_unknown(written, sorted(options))}")
        if name in values:
            raise typer.BadParameter(f"{path}: {written!r} is there twice, once with _ and once with -.")
        if isinstance(value, dict):
            raise typer.BadParameter(f"{path}: {written!r} is a table; options are plain values.")
        is_path = name in PATHS and isinstance(value, str)
        values[name] = str(path.absolute().parent / value) if is_path else value
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _unknown(written: str, known: list[str]) -> str:
    near = difflib.get_close_matches(written.replace("-", "_"), known, 1)
    told = f"did you mean {near[0].replace('_', '-')!r}?" if near else f"known are {', '.join(known)}."
    return f"{written!r} is not an option; {told.replace('_', '-')}"
