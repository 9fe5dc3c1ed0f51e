"""What /openapi.json says beside what the framework finds out: errors, bodies that are not JSON, bounds of a create."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from .events import LAST
from .telling import NAMES


class ErrorBody(BaseModel):
    """What went wrong: `code` for programs, `message` for people, `param` the field at fault."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorEnvelope(BaseModel):
    """Every answer from 400 on, as OpenAI's clients read it."""

    error: ErrorBody


class Readiness(BaseModel):
    """Whether a job would be run now, and what the worker is doing."""

    ready: bool
    phase: str
    model: str


# For every route. With these the framework leaves out its own 422, whose body no client of ours ever sees.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorEnvelope, "description": "The request is refused."},
    "5XX": {"model": ErrorEnvelope, "description": "The server cannot serve it, now or ever."},
}
NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": Readiness, "description": "No job would be run now."}
}


def binary(*kinds: str, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """An answer whose body is a file, of one of these media types."""
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {status: {"description": "The file.", "content": dict.fromkeys(kinds, schema)}}


EVENT = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"enum": sorted({*NAMES.values(), *LAST, "queued", "loading", "preview"})},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["id", "event", "data"],
}
# A browser that comes back with the last event's id is told by 204 to stay away.
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events.",
        "content": {"text/event-stream": {"schema": EVENT}},
    },
    204: {"description": "The event of `Last-Event-ID` was the last one."},
}


# What no model serves. ClipRequest refuses it, with better words than a schema's; a test holds the two together.
BOUNDS: Mapping[str, Mapping[str, Any]] = {
    "prompt": {"pattern": r"\S", "maxLength": 4096},
    "negative_prompt": {"maxLength": 4096},
    "size": {"pattern": "^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$"},
    "width": {"minimum": 1},
    "height": {"minimum": 1},
    "num_frames": {"minimum": 1},
    "fps": {"minimum": 1, "maximum": 60},
    "seed": {"minimum": 0, "maximum": 2**63 - 1},
    "num_inference_steps": {"minimum": 1, "maximum": 200},
    "guidance_scale": {"minimum": 0, "maximum": 100},
    "guidance_scale_2": {"minimum": 0, "maximum": 100},
    "flow_shift": {"minimum": 0.01, "maximum": 100},
}
EXAMPLE = {
    "prompt": "a large red circle moving right on a black background",
    "seed": 7,
    "num_inference_steps": 4,
}


def create_body(model: type[BaseModel]) -> dict[str, Any]:
    """The request body of a create. A form has no null, where a field is left out, and no object or list, whose
    members have fields of their own there (`input_reference[image_url]`, `lora[]`)."""
    schema = model.model_json_schema()
    for name, bounds in BOUNDS.items():
        schema["properties"][name].update(bounds)
    form = {**schema, "properties": {name: _as_field(told) for name, told in schema["properties"].items()}}
    file = {**form["properties"]["input_reference"], "contentMediaType": "application/octet-stream"}
    content = {
        kind: {"schema": told, "example": EXAMPLE}
        for kind, told in {
            "multipart/form-data": {**form, "properties": {**form["properties"], "input_reference": file}},
            "application/x-www-form-urlencoded": form,
            "application/json": schema,
        }.items()
    }
    return {"required": True, "content": content}


def _as_field(told: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in told.items() if name not in ("anyOf", "oneOf", "default")}
    [kind] = [kind for kind in told.get("anyOf", [{}]) if kind.get("type") != "null"]
    [*way] = [way for way in told.get("oneOf", []) if way.get("type") not in ("object", "array")]
    return {**kind, **rest, **(way[0] if way else {})}
