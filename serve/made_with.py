"""What decides a clip besides its request: the model, its files, how they are multiplied, the LoRAs, the versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wan_runtime import list_loras, lora_digests

from .settings import Settings

KEPT = ("variant", "dialect", "quantised_layers", "dtype", "device_name", "scheduler", "versions")


def made_with(settings: Settings, facts: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """As plain data, for the job and for the clip's own comment. A LoRA is told by the SHA-256 of its files."""
    files = [path.name for path in (settings.checkpoint, settings.checkpoint_low) if path]
    made = {"model": settings.model_name, "checkpoints": files} | {name: facts[name] for name in KEPT}
    asked = request.get("lora")
    if asked and settings.lora_dir is not None:
        known = list_loras(settings.lora_dir)
        made["loras"] = {name: lora_digests(known[name]) for name in asked if name in known}
    return made
