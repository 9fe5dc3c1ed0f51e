"""The model that this server runs, as /v1/models tells it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from wan_runtime import Lora

from ..errors import ApiError
from ..services import Served, Services
from ..state import profile_fields
from . import Endpoint

router = APIRouter(prefix="/v1/models", tags=["models"])


def _describe(served: Services) -> dict[str, Any]:
    settings, state = served.settings, served.engine.state
    checkpoints = [path.name for path in (settings.checkpoint, settings.checkpoint_low) if path]
    return {
        "id": settings.model_name,
        "object": "model",
        "created": int(served.started_at),
        "owned_by": "wan-runtime",
        "bundled": settings.is_bundled,
        "description": (
            "The tiny demonstration model that comes with wan-runtime; name your own with --checkpoint."
            if settings.is_bundled
            else "A WAN text-to-video checkpoint."
        ),
        "checkpoints": checkpoints,
        "loras": [_lora(lora) for lora in (served.loras() or {}).values()],
        "phase": state.phase,
        "limits_and_defaults": profile_fields(state.profile) if state.profile else None,
        "runtime": state.facts or None,
        "worker": {"pid": state.pid, **state.counters.read()},
    }


def _lora(lora: Lora) -> dict[str, Any]:
    experts = [which for which, path in (("high", lora.high), ("low", lora.low)) if path]
    return {"name": lora.name, "experts": experts, "bytes": sum(path.stat().st_size for path in lora.files)}


@router.get("")
def list_models(served: Served) -> dict[str, Any]:
    """The one model served."""
    return {"object": "list", "data": [_describe(served)]}


@router.get("/{model}")
def retrieve_model(model: str, served: Served) -> dict[str, Any]:
    """The model by its name."""
    if model != served.settings.model_name:
        raise unknown_model(model, served)
    return _describe(served)


def unknown_model(model: str, served: Services) -> ApiError:
    """The client named a model that is not served."""
    return ApiError(
        404,
        "model_not_found",
        f"The model {model[:80]!r} is not served here; {served.settings.model_name!r} is. It may also be left out.",
        param="model",
    )


ENDPOINT = Endpoint(router)
