"""Quantised WAN video models, right or refused. `import wan_runtime; wan_runtime.patch(model)`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wan_runtime.version import VERSION

if TYPE_CHECKING:
    from wan_runtime.adapters import Lora, list_loras, lora_digests
    from wan_runtime.api import inspect, load, patch, unpatch
    from wan_runtime.aside import written_aside
    from wan_runtime.asking import ClipProfile, ClipRequest, frames_for
    from wan_runtime.calibrating import calibrate
    from wan_runtime.catalogue import Catalogue
    from wan_runtime.comparing import compare
    from wan_runtime.converting import convert
    from wan_runtime.errors import InvalidRequest, WanRuntimeError
    from wan_runtime.generating import clip_profile, generate
    from wan_runtime.pipelines import load_pipeline, plan_pipeline
    from wan_runtime.starting import StartImage, fitted, open_image
    from wan_runtime.video import write_video

# Looked up on first use, so that importing one layer loads no higher one, and the package costs nothing until used.
_HOME = {
    "patch": "api",
    "load": "api",
    "unpatch": "api",
    "inspect": "api",
    "calibrate": "calibrating",
    "compare": "comparing",
    "convert": "converting",
    "Lora": "adapters",
    "list_loras": "adapters",
    "lora_digests": "adapters",
    "Catalogue": "catalogue",
    "InvalidRequest": "errors",
    "WanRuntimeError": "errors",
    "ClipProfile": "asking",
    "ClipRequest": "asking",
    "clip_profile": "generating",
    "frames_for": "asking",
    "generate": "generating",
    "load_pipeline": "pipelines",
    "plan_pipeline": "pipelines",
    "StartImage": "starting",
    "fitted": "starting",
    "open_image": "starting",
    "write_video": "video",
    "written_aside": "aside",
}

__version__ = VERSION
__all__ = [
    "Catalogue",
    "ClipProfile",
    "ClipRequest",
    "InvalidRequest",
    "Lora",
    "StartImage",
    "WanRuntimeError",
    "calibrate",
    "clip_profile",
    "compare",
    "convert",
    "fitted",
    "frames_for",
    "generate",
    "inspect",
    "list_loras",
    "load",
    "load_pipeline",
    "lora_digests",
    "open_image",
    "patch",
    "plan_pipeline",
    "unpatch",
    "write_video",
    "written_aside",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wan_runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(f"wan_runtime.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted((*globals(), *_HOME))
