"""`wan-serve`: serves a WAN checkpoint over HTTP. This is where options become settings, and nowhere else."""

from __future__ import annotations

import logging
import re
import signal
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from rich.console import Console

from . import keys, logs, otlp
from .app import create_app
from .config import TABLES, from_file, with_models
from .connections import http_config
from .draining import DrainingServer
from .dry_run import plan
from .keys_cli import keys_app
from .services import Services, SpansRefused, open_services
from .settings import Settings, is_loopback

# Every option can also come from the environment (WAN_SERVE_PORT for --port), which is how a container is set up.
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"auto_envvar_prefix": "WAN_SERVE"},
)
log = logging.getLogger("wan_serve")
DEFAULTS = Settings()
ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+")
HOST = re.compile(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*(:[0-9]{1,5})?")
LEVELS = ("debug", "info", "warning", "error")


def _absolute(path: Path | None) -> Path | None:
    """The path from the root, links not followed: in the hub's cache a shard's name is the link's, not the file's."""
    return path and path.absolute()


app.add_typer(keys_app, name="keys")


# Every option can also be given as WAN_SERVE_<OPTION>: containers are configured through their environment.
@app.callback(invoke_without_command=True, context_settings={"auto_envvar_prefix": "WAN_SERVE"})
def serve(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, is_eager=True, callback=from_file, help=(
        "A TOML file with these options' names; what is given here or in the environment wins."))] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=(
        "Print what would be served and how, load nothing, and end."))] = False,
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
        "Listen beyond this machine although there are no API keys: for containers and behind a proxy."))] = False,
    api_keys: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, callback=_absolute, help=(
        "Ask for API keys: those in this file, which `wan-serve keys add` writes."))] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help=(
        "Let pages of this origin (https://example.org) use the server from a browser; may be repeated."))] = None,
    allow_image_host: Annotated[list[str] | None, typer.Option(help=(
        "Fetch start images from this host (images.example.org) where a client gives a URL; may be repeated. Without "
        "it they are uploaded or sent as data URLs."))] = None,
    lora_dir: Annotated[Path | None, typer.Option(exists=True, file_okay=False, callback=_absolute, help=(
        "Let clients use the LoRAs of this folder, by name: its .safetensors files."))] = None,
    upload_seconds: Annotated[float, typer.Option(min=0.1, help=(
        "How long the body of a request may take to arrive."))] = DEFAULTS.upload_seconds,
    download_seconds: Annotated[float, typer.Option(min=0.1, help=(
        "How long a client may take for 64 KiB of an answer, or for the rest of it."))] = DEFAULTS.download_seconds,
    data_dir: Annotated[Path, typer.Option(file_okay=False, resolve_path=True, help=(
        "Where jobs and clips are kept."))] = DEFAULTS.data_dir,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; default: the GPU if there is one.")] = None,
    dialect: Annotated[str | None, typer.Option(help="Who wrote the file, if its marks do not say.")] = None,
    weights: Annotated[str, typer.Option(help="Format to keep the weights in.")] = DEFAULTS.weights,
    compute: Annotated[str, typer.Option(help="Precision to multiply in.")] = DEFAULTS.compute,
    backend: Annotated[str, typer.Option(help="Who multiplies.")] = DEFAULTS.backend,
    attention: Annotated[str, typer.Option(help="Attention kernel: auto, fa3, cudnn, sdpa, fp8.")] = DEFAULTS.attention,
    attention_end_blocks: Annotated[int | None, typer.Option(min=0, help=(
        "With --attention fp8: blocks at either end of the model that attend in bf16 (default 1)."))] = None,
    attention_end_steps: Annotated[int | None, typer.Option(min=0, help=(
        "With --attention fp8: steps at either end of a clip that attend in bf16 (default 1)."))] = None,
    cancel_seconds: Annotated[float, typer.Option(min=0, help=(
        "Kill a worker that has not stopped a deleted job by then."))] = DEFAULTS.cancel_seconds,
    stall_seconds: Annotated[float, typer.Option(min=1, help=(
        "Kill a worker that has done nothing on its job for so long."))] = DEFAULTS.stall_seconds,
    drain_seconds: Annotated[float, typer.Option(min=0, help=(
        "How long the running job may go on once the server is told to stop."))] = DEFAULTS.drain_seconds,
    max_queue_seconds: Annotated[float, typer.Option(min=0, help=(
        "How much work may be waiting, in predicted seconds."))] = DEFAULTS.max_queue_seconds,
    max_job_seconds: Annotated[float, typer.Option(min=0, help=(
        "How long a clip may be predicted to take."))] = DEFAULTS.max_job_seconds,
    check_memory: Annotated[bool, typer.Option(help=(
        "Refuse clips that are predicted to need more memory than the GPU has for them."))] = DEFAULTS.check_memory,
    max_clip_gib: Annotated[float | None, typer.Option(min=0, help=(
        "How much of torch's memory a clip may be predicted to take beside the weights; default: what the GPU has, and "
        "on a CPU no limit."))] = DEFAULTS.max_clip_gib,
    keep_days: Annotated[float, typer.Option(min=0, help=(
        "Remove a finished job and its clip after so many days; 0 keeps them."))] = DEFAULTS.keep_days,
    keep_gib: Annotated[float, typer.Option(min=0, help=(
        "Remove the oldest clips where all take more than this; 0 keeps them."))] = DEFAULTS.keep_gib,
    sweep_seconds: Annotated[float, typer.Option(min=0.1, help=(
        "How often to look for what is to be removed."))] = DEFAULTS.sweep_seconds,
    embed_metadata: Annotated[bool, typer.Option(help=(
        "Write what decided a clip (prompt, seed, model, versions) into its MP4."))] = DEFAULTS.embed_metadata,
    metrics: Annotated[bool, typer.Option("--metrics", help="Keep metrics for Prometheus, at /metrics.")] = False,
    otlp_endpoint: Annotated[str | None, typer.Option(help=(
        "Send OpenTelemetry spans of every job and its phases to the collector at this URL (http://localhost:4318), by "
        "OTLP over HTTP. Needs `pip install 'wan-runtime[otel]'`."))] = None,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(LEVELS)}.")] = DEFAULTS.log_level,
    log_format: Annotated[str, typer.Option(help="text, or json: an object a line.")] = DEFAULTS.log_format,
) -> None:  # fmt: skip
    """Serves text-to-video generation over OpenAI's /v1/videos."""
    if context.invoked_subcommand is not None:
        return
    settings = Settings(
        checkpoint=checkpoint, checkpoint_low=checkpoint_low, base=base, text_encoder=text_encoder, vae=vae,
        host=host, port=port, allow_remote=allow_remote, data_dir=data_dir, device=device, dialect=dialect,
        api_keys=api_keys, allow_origin=tuple(allow_origin or ()),
        allow_image_host=tuple(allow_image_host or ()), lora_dir=lora_dir, upload_seconds=upload_seconds,
        download_seconds=download_seconds,
        weights=weights, compute=compute, backend=backend, attention=attention,
        attention_end_blocks=attention_end_blocks, attention_end_steps=attention_end_steps,
        cancel_seconds=cancel_seconds, log_level=log_level, stall_seconds=stall_seconds, drain_seconds=drain_seconds,
        max_queue_seconds=max_queue_seconds,
        max_job_seconds=max_job_seconds, check_memory=check_memory, max_clip_gib=max_clip_gib,
        keep_days=keep_days, keep_gib=keep_gib, sweep_seconds=sweep_seconds,
        embed_metadata=embed_metadata, metrics=metrics, log_format=log_format,
        otlp_endpoint=otlp_endpoint,
    )  # fmt: skip
    settings = with_models(settings, context.meta.get(TABLES, {}))
    _check(settings)
    if dry_run:
        _print_plan(settings)
        return
    logs.configure(settings.log_level, settings.log_format)
    raise typer.Exit(run(settings))


def _print_plan(settings: Settings) -> None:
    from wan_runtime import WanRuntimeError

    try:
        Console().print(plan(settings))
    except (WanRuntimeError, OSError) as error:
        typer.secho(f"wan-serve could not serve this: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


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
        server = DrainingServer(http_config(create_app(services), settings), services)
        if settings.is_bundled:
            log.info("no --checkpoint was given: serving the bundled tiny model, which draws moving shapes")
        name = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{name}:{listening.getsockname()[1]}"
        log.info(
            "listening on %s, model %s, jobs in %s", address, ", ".join(settings.models), settings.data_dir
        )
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
    if settings.log_format not in logs.FORMATS:
        raise typer.BadParameter(
            f"--log-format is {settings.log_format!r}; it must be one of {', '.join(logs.FORMATS)}."
        )
    if settings.otlp_endpoint is not None and (problem := otlp.refusal(settings.otlp_endpoint)):
        raise typer.BadParameter(problem)
    if settings.max_clip_gib is not None and not settings.check_memory:
        raise typer.BadParameter("--max-clip-gib is given beside --no-check-memory, which would not heed it.")
    if settings.checkpoint_low and not settings.checkpoint:
        raise typer.BadParameter("--checkpoint-low needs --checkpoint, the high-noise expert.")
    if not is_loopback(settings.host) and not settings.allow_remote and not settings.api_keys:
        raise typer.BadParameter(
            f"--host {settings.host} can be reached from other machines, and without API keys anybody there could use "
            "this server and read every clip. Make keys with `wan-serve keys add` and give --api-keys FILE; or put a "
            "proxy that authenticates before it and add --allow-remote; or listen on 127.0.0.1."
        )
    if settings.api_keys:
        try:
            keys.read(settings.api_keys)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"--api-keys: {error}") from None
    for origin in settings.allow_origin:
        if not ORIGIN.fullmatch(origin):
            raise typer.BadParameter(
                f"--allow-origin is {origin!r}; it must be a scheme and a host, such as https://example.org."
            )
    for host in settings.allow_image_host:
        if not HOST.fullmatch(host):
            raise typer.BadParameter(
                f"--allow-image-host is {host!r}; it must be a name, such as images.example.org, or name:port."
            )


def _open(settings: Settings, on_fatal: Callable[[str], None]) -> Services:
    try:
        return open_services(settings, on_fatal)
    except BlockingIOError:
        problem = f"another wan-serve has the data directory {settings.data_dir}. Stop it, or give another --data-dir."
    except SpansRefused as error:
        problem = f"OpenTelemetry does not take its variables (OTEL_...) in the environment: {error}"
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
