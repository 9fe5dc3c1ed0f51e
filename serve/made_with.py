"""What decides a clip besides its request: the model, its files, how they are multiplied, the LoRAs, the versions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from wan_runtime import Lora, WanRuntimeError, list_loras, lora_digests

from .settings import Settings

log = logging.getLogger("wan_serve")
KEPT = ("variant", "dialect", "quantised_layers", "dtype", "device_name", "scheduler", "versions")


def made_with(settings: Settings, facts: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """As plain data, for the job and for the clip's own comment. A LoRA is told by the SHA-256 of its files."""
    files = [path.name for path in (settings.checkpoint, settings.checkpoint_low) if path]
    made = {"model": settings.model_name, "checkpoints": files} | {name: facts[name] for name in KEPT}
    asked = request.get("lora")
    if asked:
        known = loras_of(settings)
        made["loras"] = {name: _digests(known[name]) for name in asked if name in known}
    return made


def loras_of(settings: Settings) -> dict[str, Lora]:
    """The LoRAs that a job may name now. A folder that has become unreadable has none: the log has the reason."""
    if settings.lora_dir is None:
        return {}
    try:
        return list_loras(settings.lora_dir)
    except WanRuntimeError as error:
        log.error("%s", error)
        return {}


def _digests(lora: Lora) -> list[str]:
    try:
        return lora_digests(lora)
    except OSError as error:  # the worker will find that too, and fail the job
        log.error("the LoRA %s cannot be read: %s", lora.name, error)
        return []
