"""How `wan-runtime` speaks on a terminal: results as tables or JSON, errors as one sentence, bars on stderr."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from wan_runtime.errors import InvalidOption, UnknownName, WanRuntimeError
from wan_runtime.result import Result

FAILED, MISUSED, TERMINATED = 1, 2, 128 + signal.SIGTERM


class Commands(TyperGroup):
    """Prints what this library raises on purpose as one sentence, and gives the exit status its meaning."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with terminable():
                return super().invoke(ctx)
        except WanRuntimeError as error:
            fail(str(error), status_of(error))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("diffusers", "transformers", "av"):
                raise
            fail(
                f"{error.name} is not installed. Install it with: pip install 'wan-runtime[diffusers]'",
                FAILED,
            )
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of a pipe has gone, which click knows how to end
                raise
            fail(f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "), FAILED)


def show(result: Result, as_json: bool) -> None:
    """Print a result on stdout."""
    from rich.console import Console

    if as_json:
        typer.echo(result.to_json())
    else:
        width = None if sys.stdout.isatty() else 120
        Console(width=width, markup=False, emoji=False).print(result.table(), crop=False)


def status_of(error: WanRuntimeError) -> int:
    """2 for a request that makes no sense, 1 for a file or a machine that cannot serve it."""
    return MISUSED if isinstance(error, InvalidOption | UnknownName) else FAILED


def complain(message: str) -> None:
    """Say what went wrong, on stderr."""
    typer.secho(f"wan-runtime: {message}", fg="red", err=True)


def fail(message: str, status: int) -> None:
    """End the command with one sentence on stderr."""
    complain(message)
    raise typer.Exit(status)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """While a command runs, a request to terminate unwinds it, so that what it began to write is removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def step_bar(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of the denoising steps on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("denoising", total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
