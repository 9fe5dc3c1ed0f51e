"""`wan-serve`: serves a WAN checkpoint over HTTP. This is where options become settings, and nowhere else."""

from __future__ import annotations

import logging
import signal
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from .app import create_app
from .services import Services, open_services
from .settings import Settings, is_loopback

# Every option can also come from the environment (WAN_SERVE_PORT for --port), which is how a container is set up.
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"auto_envvar_prefix": "WAN_SERVE"},
)
log = logging.getLogger("wan_serve")
DEFAULTS = Settings()
LEVELS = ("debug", "info", "warning", "error")
GRACE_SECONDS = 10  # for answers under way when the server is told to stop


def _absolute(path: Path | None) -> Path | None:
    """The path from the root, links not followed: in the hub's cache a shard's name is the link's, not the file's."""
    return path and path.absolute()


# Every option can also be given as WAN_SERVE_<OPTION>: containers are configured through their environment.
@app.command(context_settings={"auto_envvar_prefix": "WAN_SERVE"})
def serve(
    checkpoint: Annotated[Path | None, typer.Option(exists=True, callback=_absolute, help=(
        "The transformer, of any dialect: a .safetensors file, or the folder or index of one in several files. "
        "Without it the bundled tiny model is served."))] = None,
    checkpoint_low: Annotated[Path | None, typer.Option(exists=True, callback=_absolute, help=(
        "The low-noise expert of a two-expert model; --checkpoint is then the high-noise one."))] = None,
    base: Annotated[str | None, typer.Option(help=(
        "Diffusers directory or hub id with the text encoder, VAE, tokenizer and scheduler."))] = None,
    text_encoder: Annotated[Path | None, typer.Option(exists=True, callback=_absolute, help=(
        "Another text encoder: a .safetensors file, plain or quantised, or a diffusers directory."))] = None,
    vae: Annotated[Path | None, typer.Option(exists=True, callback=_absolute, help=(
        "Another VAE: a .safetensors file or a diffusers directory."))] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = DEFAULTS.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = DEFAULTS.port,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help=(
        "Listen beyond this machine although there is no authentication: for containers and behind a proxy."))] = False,
    data_dir: Annotated[Path, typer.Option(file_okay=False, resolve_path=True, help=(
        "Where jobs and clips are kept."))] = DEFAULTS.data_dir,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: the GPU if there is one.")] = None,
    dialect: Annotated[str | None, typer.Option(help="Who wrote the file, if its marks do not say.")] = None,
    weights: Annotated[str, typer.Option(help="Format to keep the weights in.")] = DEFAULTS.weights,
    compute: Annotated[str, typer.Option(help="Precision to multiply in.")] = DEFAULTS.compute,
    backend: Annotated[str, typer.Option(help="Who multiplies.")] = DEFAULTS.backend,
    cancel_seconds: Annotated[float, typer.Option(min=0, help=(
        "Kill a worker that has not stopped a deleted job by then."))] = DEFAULTS.cancel_seconds,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(LEVELS)}.")] = DEFAULTS.log_level,
) -> None:  # fmt: skip
    """Serves text-to-video generation over OpenAI's /v1/videos."""
    settings = Settings(
        checkpoint=checkpoint, checkpoint_low=checkpoint_low, base=base, text_encoder=text_encoder, vae=vae,
        host=host, port=port, allow_remote=allow_remote, data_dir=data_dir, device=device, dialect=dialect,
        weights=weights, compute=compute, backend=backend, cancel_seconds=cancel_seconds, log_level=log_level,
    )  # fmt: skip
    _check(settings)
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s")
    raise typer.Exit(run(settings))


def run(settings: Settings) -> int:
    """Serves until it is told to stop. The exit status: 0 after a stop, 1 if the model could not be kept running."""
    reasons: list[str] = []
    server: uvicorn.Server | None = None

    def on_fatal(reason: str) -> None:
        reasons.append(reason)
        if server is not None:
            server.should_exit = True

    with _listen(settings) as listening:
        services = _open(settings, on_fatal)
        config = uvicorn.Config(
            create_app(services),
            log_config=None,
            access_log=settings.log_level == "debug",  # pollers would fill the log
            timeout_graceful_shutdown=GRACE_SECONDS,
            server_header=False,
        )
        server = uvicorn.Server(config)
        if settings.is_bundled:
            log.info("no --checkpoint was given: serving the bundled tiny model, which draws moving shapes")
        name = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{name}:{listening.getsockname()[1]}"
        log.info("listening on %s, model %s, jobs in %s", address, settings.model_name, settings.data_dir)
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again after its orderly shutdown
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listening])
    for reason in reasons:
        typer.secho(f"wan-serve cannot go on: {reason}", fg="red", err=True)
    return 1 if reasons else 0


def _check(settings: Settings) -> None:
    if settings.log_level not in LEVELS:
        raise typer.BadParameter(
            f"--log-level is {settings.log_level!r}; it must be one of {', '.join(LEVELS)}."
        )
    if settings.checkpoint_low and not settings.checkpoint:
        raise typer.BadParameter("--checkpoint-low needs --checkpoint, the high-noise expert.")
    if not is_loopback(settings.host) and not settings.allow_remote:
        raise typer.BadParameter(
            f"--host {settings.host} can be reached from other machines, and this server has no authentication: "
            "anybody there could use it and read every clip. Put a proxy that authenticates before it and add "
            "--allow-remote, or listen on 127.0.0.1."
        )


def _open(settings: Settings, on_fatal: Callable[[str], None]) -> Services:
    try:
        return open_services(settings, on_fatal)
    except BlockingIOError:
        problem = f"another wan-serve has the data directory {settings.data_dir}. Stop it, or give another --data-dir."
    except (OSError, ValueError, sqlite3.Error) as error:
        problem = f"the data directory {settings.data_dir} cannot be used: {error}"
    typer.secho(f"wan-serve cannot start: {problem}", fg="red", err=True)
    raise typer.Exit(1)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        typer.secho(
            f"wan-serve cannot listen on {settings.host}:{settings.port}: {error.strerror}. Give another --port.",
            fg="red",
            err=True,
        )
        raise typer.Exit(1) from error
