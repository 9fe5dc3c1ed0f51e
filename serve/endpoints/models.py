"""The models that this server runs, as /v1/models tells them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from wan_runtime import Lora

from ..errors import ApiError
from ..services import Served, Services
from ..state import profile_fields
from . import Endpoint

router = APIRouter(prefix="/v1/models", tags=["models"])


def _describe(served: Services, name: str) -> dict[str, Any]:
    settings, state = served.settings.models[name], served.engine.state
    checkpoints = [path.name for path in (settings.checkpoint, settings.checkpoint_low) if path]
    known = state.models.get(name)
    held = len(served.settings.models) == 1 or state.model == name
    return {
        "id": name,
        "object": "model",
        "created": int(served.started_at),
        "owned_by": "wan-runtime",
        "bundled": settings.is_bundled,
        "description": (
            "The tiny demonstration model that comes with wan-runtime; name your own with --checkpoint."
            if settings.is_bundled
            else "A WAN video checkpoint."
        ),
        "checkpoints": checkpoints,
        "loras": [_lora(lora) for lora in (served.loras(name) or {}).values()],
        "phase": state.phase if held else "unloaded",
        "limits_and_defaults": profile_fields(known.profile) if known else None,
        "runtime": known.facts if known else None,
        "memory": {"rest": known.memory.rest, "room": known.memory.room} if known and known.memory else None,
        "worker": {"pid": state.pid, **state.counters.read()},
    }


def _lora(lora: Lora) -> dict[str, Any]:
    experts = [which for which, path in (("high", lora.high), ("low", lora.low)) if path]
    return {"name": lora.name, "experts": experts, "bytes": sum(path.stat().st_size for path in lora.files)}


@router.get("")
def list_models(served: Served) -> dict[str, Any]:
    """The models served, the first being the one that is meant where a create names none."""
    return {"object": "list", "data": [_describe(served, name) for name in served.settings.models]}


@router.get("/{model}")
def retrieve_model(model: str, served: Served) -> dict[str, Any]:
    """A model by its name."""
    if model not in served.settings.models:
        raise unknown_model(model, served)
    return _describe(served, model)


def unknown_model(model: str, served: Services) -> ApiError:
    """The client named a model that is not served."""
    names = list(served.settings.models)
    there = f"{names[0]!r} is" if len(names) == 1 else f"there are {', '.join(names)}"
    return ApiError(
        404,
        "model_not_found",
        f"The model {model[:80]!r} is not served here; {there}. It may also be left out.",
        param="model",
    )


ENDPOINT = Endpoint(router)
