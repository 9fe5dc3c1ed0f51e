"""`wan-serve keys`: who may use the server. A running one takes up every change at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import keys

keys_app = typer.Typer(help="Add, revoke and list API keys.", no_args_is_help=True)
KeyFile = Annotated[
    Path, typer.Option("--api-keys", dir_okay=False, envvar="WAN_SERVE_API_KEYS", help="The file of keys.")
]


@keys_app.command()
def add(
    name: Annotated[str, typer.Argument(help="Who is to have the key; for people, and for revoking it.")],
    api_keys: KeyFile,
    max_active: Annotated[int | None, typer.Option(min=1, help="Jobs queued or running at once.")] = None,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Creates a minute.")] = None,
) -> None:
    """Makes a key, writes its hash into the file, and prints the key, which cannot be shown again."""
    try:
        key, record = keys.make(name, max_active=max_active, per_minute=per_minute)
        keys.add(api_keys, record)
    except (OSError, ValueError) as error:
        raise _failed(error) from None
    typer.echo(key)
    typer.secho(f"The key of {name}. Keep it now: {api_keys} holds only its hash.", err=True)


@keys_app.command()
def revoke(name: Annotated[str, typer.Argument(help="The key's name or id.")], api_keys: KeyFile) -> None:
    """Takes a key out of the file. Its jobs stay, and nobody can see them."""
    try:
        record = keys.revoke(api_keys, name)
    except (OSError, ValueError) as error:
        raise _failed(error) from None
    typer.echo(f"Revoked {record.name} ({record.id}).")


@keys_app.command("list")
def list_keys(api_keys: KeyFile) -> None:
    """Lists the keys in the file: names, ids and limits."""
    try:
        records = keys.read(api_keys)
    except (OSError, ValueError) as error:
        raise _failed(error) from None
    table = Table("name", "id", "created", "active at once", "creates a minute")
    for record in records.values():
        made = time.strftime("%Y-%m-%d", time.gmtime(record.created_at))
        limits = ("any" if limit is None else str(limit) for limit in (record.max_active, record.per_minute))
        table.add_row(record.name, record.id, made, *limits)
    Console().print(table)


def _failed(error: Exception) -> typer.Exit:
    typer.secho(str(error), fg="red", err=True)
    return typer.Exit(1)
