"""`--dry-run`: what would be served and how, found out as at a start but with no weight loaded and nothing opened."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Group, RenderableType
from rich.table import Table

from .settings import Settings


def plan(settings: Settings) -> RenderableType:
    """The settings in words, then for each transformer its dialect, formats, backends, attention and memory.

    Raises what `wan_runtime.load_pipeline` raises.
    """
    import wan_runtime

    if settings.more:
        return Group(*(plan(replace(one, more=())) for one in settings.models.values()))
    planned = wan_runtime.plan_pipeline(**settings.pipeline_options())
    base = settings.base or "bundled"
    if planned.base.index is None:
        base += ", not looked up"
    return Group(_settings(settings, base), *(report.table() for report in planned.reports))


def _settings(settings: Settings, base: str) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    keys = (
        f"asked for, from {settings.api_keys}" if settings.api_keys else "none: every caller is the same one"
    )
    rows = {
        "model": settings.model_name,
        "checkpoint": settings.checkpoint or "the bundled tiny model",
        "low-noise expert": settings.checkpoint_low,
        "base": base,
        "text encoder": settings.text_encoder,
        "VAE": settings.vae,
        "device": settings.device or "the GPU if there is one, else the CPU",
        "address": f"{settings.host}, port {settings.port}",
        "API keys": keys,
        "jobs and clips": settings.data_dir,
        "spans": settings.otlp_endpoint and f"sent to {settings.otlp_endpoint}",
        "memory of a clip": _memory(settings),
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    return table


def _memory(settings: Settings) -> str:
    """What is asked of a clip's memory; what there is for it is known once the model has been loaded and used."""
    if not settings.check_memory:
        return "not looked at"
    if settings.max_clip_gib is None:
        return "as much as the GPU has beside the weights; on a CPU not looked at"
    return f"up to {settings.max_clip_gib:g} GiB beside the weights"
