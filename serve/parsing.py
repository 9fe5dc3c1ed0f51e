"""From the body of a create to a clip request. The `openai` client always sends multipart, curl users send JSON.

In a form every value is a string and nested ones come bracketed (`input_reference[image_url]`). A field that is not
known is refused, not dropped: someone who writes `step=8` must not wait for 50 steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from wan_runtime import ClipProfile, ClipRequest, InvalidRequest, Lora, frames_for

from .errors import ApiError
from .inputs import UNKNOWN
from .lora_fields import SCHEMA, LoraChoice, strengths_of, take_loras
from .references import FIELD, Reference, take_reference
from .start_images import refusal
from .uploads import (
    JSON,
    MULTIPART,
    PLAIN_FORM,
    Count,
    Uploads,
    check_charset,
    json_fields,
    plain_fields,
    read_multipart,
    read_whole,
)

INTEGERS = Field(
    ge=-(2**63), le=2**63 - 1
)  # wider ones are no use, and their products too long to be written out
Whole = Annotated[int, INTEGERS]
SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")

REFERENCE = {
    "description": "The image that the clip starts from: an uploaded file (PNG, JPEG, WebP), or a data URL.",
    "oneOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"image_url": {"type": "string"}},
            "required": ["image_url"],
            "additionalProperties": False,
        },
    ],
}


class CreateVideo(BaseModel):
    """What a client may ask for. The first four are OpenAI's; the rest are ours, and all but the prompt optional."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(description="What the clip is to show.")
    model: str | None = Field(None, description="The served model's name, as /v1/models gives it.")
    seconds: float | None = Field(None, gt=0, le=600, description="Length; snapped to 4n+1 frames at `fps`.")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, such as 832x480.")
    negative_prompt: str | None = Field(None, description="What it is not to show.")
    seed: Whole | None = Field(None, description="Of the first noise; random, and told, if left out.")
    num_inference_steps: Whole | None = Field(None, description="Denoising steps, 1 to 200.")
    guidance_scale: float | None = Field(
        None, description="How strongly the prompt is followed; 1 turns it off."
    )
    guidance_scale_2: float | None = Field(
        None, description="The same for the low-noise expert of a two-expert model."
    )
    num_frames: Whole | None = Field(None, description="4n+1; instead of `seconds`.")
    fps: Whole | None = Field(None, description="Frames a second.")
    width: Whole | None = Field(None, description="With `height`, instead of `size`.")
    height: Whole | None = Field(None, description="With `width`, instead of `size`.")
    flow_shift: float | None = Field(None, description="Of the scheduler, for this clip.")
    lora: Annotated[list[LoraChoice] | None, WithJsonSchema(SCHEMA)] = None
    input_reference: Annotated[str | None, WithJsonSchema(REFERENCE)] = None

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: object) -> object:
        if isinstance(value, bool):  # pydantic reads true as the number 1
            raise PydanticCustomError("boolean", "no field takes true or false")
        return value


async def read_create(
    request: Request, uploads: Uploads, count: Count
) -> tuple[CreateVideo, Reference | None]:
    """The body of a create, from multipart, a plain form or JSON, and its start image's content or URL.

    Raises ApiError for anything that is not one.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in (MULTIPART, PLAIN_FORM):
        check_charset(request.headers["content-type"])
    if kind == MULTIPART:
        fields, size = await read_multipart(request, count)
        return await uploads.decoded(size, lambda: _understood(fields))
    if kind in (PLAIN_FORM, JSON):
        body = await read_whole(request, count)
        decode = json_fields if kind == JSON else plain_fields
        return await uploads.decoded(len(body), lambda: _understood(decode(body)))
    raise ApiError(
        415,
        "unsupported_media_type",
        f"The body is {kind[:80] or 'of no stated type'}. Send multipart/form-data (as the openai client does) or "
        "application/json.",
    )


def _understood(fields: Mapping[str, Any]) -> tuple[CreateVideo, Reference | None]:
    fields, reference = take_reference(take_loras(fields))
    try:
        return CreateVideo.model_validate(fields), reference
    except ValidationError as error:
        raise _refusal(error) from None


def clip_request(
    asked: CreateVideo, profile: ClipProfile, loras: Mapping[str, Lora] | None = None
) -> ClipRequest:
    """The request in full: the model's defaults where the client was silent. Raises ApiError with the numbers.

    A start image is counted as there, and its digest is yet to be filled in.
    """
    width, height = _size(asked)
    fps = asked.fps if asked.fps is not None else profile.fps
    given = asked.model_dump(exclude={"prompt", "model", "seconds", "size", "width", "height", FIELD, "lora"})
    given["lora"] = strengths_of(asked.lora, loras)
    given["image"] = UNKNOWN if asked.input_reference is not None else None
    try:
        if asked.seconds is not None:
            given["num_frames"] = _frames(asked.seconds, fps, asked.num_frames)
        return profile.request(asked.prompt, width=width, height=height, **given)
    except InvalidRequest as error:
        if error.param == "image":
            raise refusal(error) from None
        param = "size" if asked.size is not None and error.param in ("width", "height") else error.param
        raise ApiError(422, error.code, str(error), param=param) from None


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    param = str(first["loc"][0])[:80]
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        known = ", ".join(CreateVideo.model_fields)
        return ApiError(400, "unknown_parameter", f"{param!r} is not known. Known: {known}.", param=param)
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return ApiError(422, "missing_parameter", f"{param} is missing.", param=param)
    code = "invalid_size" if param in ("width", "height") else f"invalid_{param}"
    message = f"{param} is {str(first['input'])[:80]!r}: {first['msg']}."
    return ApiError(422, code, message, param=param)


def _size(asked: CreateVideo) -> tuple[int | None, int | None]:
    if asked.size is None:
        if (asked.width is None) != (asked.height is None):
            raise ApiError(
                422, "invalid_size", "width and height go together; only one was given.", param="size"
            )
        return asked.width, asked.height
    match = SIZE.fullmatch(asked.size)
    if match is None:
        message = f"size is {asked.size[:80]!r}; it must be WIDTHxHEIGHT, such as 832x480."
        raise ApiError(422, "invalid_size", message, param="size")
    width, height = int(match[1]), int(match[2])
    if asked.width not in (None, width) or asked.height not in (None, height):
        message = (
            f"size {asked.size} and width {asked.width}, height {asked.height} disagree. Give one of the two."
        )
        raise ApiError(422, "conflicting_parameters", message, param="size")
    return width, height


def _frames(seconds: float, fps: int, num_frames: int | None) -> int:
    frames = frames_for(seconds, fps)
    if num_frames is not None and num_frames != frames:
        message = f"{seconds:g} s at {fps} fps are {frames} frames, and num_frames is {num_frames}. Give one."
        raise ApiError(422, "conflicting_parameters", message, param="num_frames")
    return frames
