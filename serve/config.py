"""A TOML file with the options' own names. The command line and the environment win over it; others are errors.

A table `[models.NAME]` is a model, with the options that a model has of its own; what it leaves out, it shares.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import typer

from .settings import Settings

NOT_IN_A_FILE = frozenset({"config", "dry_run", "help"})
OF_A_MODEL = ("checkpoint", "checkpoint_low", "base", "text_encoder", "vae", "dialect", "weights", "compute", "backend",
              "attention", "lora_dir")  # fmt: skip
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TABLES = "wan_serve.models"  # where the context keeps them
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
    context.meta[TABLES] = _tables(path, given.pop("models", {}))
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


def with_models(settings: Settings, tables: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The settings with a file's models, the first of which is the one that is meant where a client names none.

    Raises BadParameter where a model is also given outside of the tables.
    """
    if not tables:
        return settings
    if settings.checkpoint or settings.checkpoint_low:
        raise typer.BadParameter(
            "a checkpoint is given beside the file's [models]: put it into one of the tables."
        )
    first, *more = (replace(settings, name=name, **table) for name, table in tables.items())
    return replace(first, more=tuple(more))


def _tables(path: Path, given: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(given, dict) or not all(isinstance(table, dict) for table in given.values()):
        raise typer.BadParameter(f"{path}: models are tables: [models.NAME], each with its own checkpoint.")
    return {name: _table(path, name, table) for name, table in given.items()}


def _table(path: Path, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if not MODEL_NAME.fullmatch(name):
        raise typer.BadParameter(
            f"{path}: {name[:80]!r} is no name of a model: letters, digits, dots and dashes."
        )
    values: dict[str, Any] = {}
    for written, value in given.items():
        option = written.replace("-", "_")
        if option not in OF_A_MODEL:
            raise typer.BadParameter(f"{path}, models.{name}: {_unknown(written, sorted(OF_A_MODEL))}")
        if not isinstance(value, str) or option in values:
            raise typer.BadParameter(
                f"{path}, models.{name}: {written!r} is there twice, or is not a string."
            )
        values[option] = path.absolute().parent / value if option in PATHS else value
        if option in PATHS and not values[option].exists():
            raise typer.BadParameter(f"{path}, models.{name}: {written} = {value!r} is not there.")
    if "checkpoint" not in values:
        raise typer.BadParameter(f"{path}, models.{name}: checkpoint is missing.")
    return values


def _unknown(written: str, known: list[str]) -> str:
    near = difflib.get_close_matches(written.replace("-", "_"), known, 1)
    told = f"did you mean {near[0].replace('_', '-')!r}?" if near else f"known are {', '.join(known)}."
    return f"{written!r} is not an option; {told.replace('_', '-')}"
