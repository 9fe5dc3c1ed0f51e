"""What a clip is asked with, and what a pipeline accepts: refused here before any work is done.

diffusers would round a bad size or frame count and go on; here that is an error.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from wan_runtime.errors import InvalidRequest

MAX_STEPS = 200
MAX_FPS = 60
MAX_PROMPT = 4096  # characters; UMT5 reads 512 tokens and cuts the rest
MAX_LORAS = 4
MAX_STRENGTH = 4
MAX_SEED = 2**63 - 1
DIGEST = re.compile(r"[0-9a-f]{64}")
FRAMES_PER_LATENT = 4  # the causal VAE: one frame, then four a latent, hence 4n+1


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """One clip, fully decided: the same request on the same pipeline and device gives the same frames.

    Sizes are in pixels, `fps` in frames a second; `seed` draws the first noise on the CPU, so that it does not depend
    on the device. `guidance_scale_2` is the second expert's (Wan2.2 A14B) and `flow_shift` replaces the scheduler's;
    None keeps the pipeline's own. `image` is the SHA-256, in hex, of the file that the clip starts from; `lora` maps
    names of LoRAs to their strengths. Raises InvalidRequest for values that no pipeline accepts.
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    seed: int
    flow_shift: float | None = None
    image: str | None = None
    lora: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_prompts(self)
        _check_frames(self.num_frames)
        _check_range("width", self.width, 1, None, "pixels")
        _check_range("height", self.height, 1, None, "pixels")
        _check_range("fps", self.fps, 1, MAX_FPS, "frames a second")
        _check_range("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS, "steps")
        _check_range("seed", self.seed, 0, MAX_SEED, "")
        _check_range("guidance_scale", self.guidance_scale, 0, 100, "")
        if self.guidance_scale_2 is not None:
            _check_range("guidance_scale_2", self.guidance_scale_2, 0, 100, "")
        if self.flow_shift is not None:
            _check_range("flow_shift", self.flow_shift, 0.01, 100, "")
        if self.image is not None and not DIGEST.fullmatch(self.image):
            raise InvalidRequest(
                "image", "invalid_image", f"image is {self.image[:80]!r}; it must be a SHA-256 in hex."
            )
        if len(self.lora) > MAX_LORAS:
            raise InvalidRequest(
                "lora", "invalid_lora", f"{len(self.lora)} LoRAs are asked for; up to {MAX_LORAS} are used."
            )
        for strength in self.lora.values():
            _check_range("lora", strength, -MAX_STRENGTH, MAX_STRENGTH, "in strength")

    @property
    def seconds(self) -> float:
        """How long the clip plays."""
        return self.num_frames / self.fps


@dataclass(frozen=True, kw_only=True)
class ClipProfile:
    """What one pipeline accepts, and what it uses where a request is silent.

    `size_multiple` is VAE scale x patch: 16 for the Wan2.1 VAE, 32 for Wan2.2 TI2V-5B. `max_pixels` is width x height.
    `takes_image` tells whether a clip starts from an image: never, if one is given (TI2V-5B), always (I2V).
    """

    size_multiple: int
    max_pixels: int
    max_frames: int
    two_experts: bool
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    takes_image: Literal["none", "optional", "required"] = "none"

    def request(self, prompt: str, **given: Any) -> ClipRequest:
        """A checked request: `given` where it is not None, this profile's defaults elsewhere, a random seed if none.

        Raises InvalidRequest, naming the field, for what this pipeline cannot do.
        """
        known = {one.name for one in fields(ClipRequest)}
        values = {name: getattr(self, name) for name in known if hasattr(self, name)}
        values["seed"] = secrets.randbelow(2**31)  # 31 bits: every client can hold it
        values.update({name: value for name, value in given.items() if value is not None})
        asked, second = given.get("guidance_scale"), given.get("guidance_scale_2")
        if self.two_experts and asked is not None and second is None:
            values["guidance_scale_2"] = values["guidance_scale"]
        request = ClipRequest(prompt=prompt, **values)
        check_request(request, self)
        return request


def profile_for(
    *,
    size_multiple: int,
    in_channels: int,
    out_channels: int,
    text_dim: int,
    two_experts: bool,
    expand_timesteps: bool,
) -> ClipProfile:
    """What a pipeline of these sizes accepts; the defaults are those its model was published with.

    expand_timesteps: whether it takes a timestep a token, as TI2V-5B does.
    """
    from_image = in_channels > out_channels
    common: dict[str, Any] = {
        "size_multiple": size_multiple,
        "two_experts": two_experts,
        "takes_image": "required" if from_image else "optional" if expand_timesteps else "none",
    }
    if text_dim == 128:  # the bundled tiny model
        second = 3.0 if two_experts else None
        return ClipProfile(
            **common, width=128, height=128, num_frames=17, fps=8, num_inference_steps=20, guidance_scale=3.0,
            guidance_scale_2=second, max_pixels=256 * 256, max_frames=65,
        )  # fmt: skip
    common |= {"max_pixels": 1920 * 1088, "max_frames": 257}
    if in_channels == 48:  # Wan2.2 TI2V-5B
        return ClipProfile(
            **common, width=1280, height=704, num_frames=121, fps=24, num_inference_steps=50, guidance_scale=5.0
        )  # fmt: skip
    if two_experts:  # Wan2.2 A14B; I2V's experts are both published with 3.5
        first, second = (3.5, 3.5) if from_image else (4.0, 3.0)
        return ClipProfile(
            **common, width=1280, height=720, num_frames=81, fps=16, num_inference_steps=40, guidance_scale=first,
            guidance_scale_2=second,
        )  # fmt: skip
    return ClipProfile(
        **common, width=832, height=480, num_frames=81, fps=16, num_inference_steps=50, guidance_scale=5.0
    )


def check_given(prompt: str, **given: Any) -> None:
    """Raises InvalidRequest for values that no pipeline accepts, so that none need be loaded to refuse them.

    `given` holds fields of ClipRequest, None where the pipeline's default is to be used.
    """
    harmless: dict[str, Any] = {
        "width": 1, "height": 1, "num_frames": 1, "fps": 1, "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 0,
    }  # fmt: skip
    ClipRequest(
        prompt=prompt, **harmless | {name: value for name, value in given.items() if value is not None}
    )


def check_request(request: ClipRequest, profile: ClipProfile) -> None:
    """Raises InvalidRequest where the pipeline of `profile` cannot make the clip that `request` asks for."""
    multiple = profile.size_multiple
    for name, pixels in (("width", request.width), ("height", request.height)):
        if pixels % multiple:
            near = sorted({max(pixels // multiple, 1) * multiple, (pixels // multiple + 1) * multiple})
            raise InvalidRequest(
                name,
                "invalid_size",
                f"{name} {pixels} is not a multiple of {multiple}, which is this model's VAE scale times its patch. "
                f"Nearest: {' or '.join(map(str, near))}.",
            )
    if request.width * request.height > profile.max_pixels:
        raise InvalidRequest(
            "size",
            "invalid_size",
            f"{request.width}x{request.height} is {request.width * request.height} pixels; this model takes up to "
            f"{profile.max_pixels}.",
        )
    if request.num_frames > profile.max_frames:
        raise InvalidRequest(
            "num_frames",
            "invalid_num_frames",
            f"{request.num_frames} frames ({request.seconds:g} s at {request.fps} fps) are more than this model's "
            f"{profile.max_frames}.",
        )
    if request.guidance_scale_2 is not None and not profile.two_experts:
        raise InvalidRequest(
            "guidance_scale_2",
            "invalid_guidance_scale_2",
            "guidance_scale_2 is for models with two experts (Wan2.2 A14B); this one has one. Leave it out.",
        )
    if request.image is not None and profile.takes_image == "none":
        raise InvalidRequest(
            "image",
            "image_unsupported",
            "This is a text-to-video model, which takes no start image. Leave it out.",
        )
    if request.image is None and profile.takes_image == "required":
        raise InvalidRequest(
            "image",
            "image_required",
            "This is an image-to-video model: every clip of it starts from an image.",
        )


def frames_for(seconds: float, fps: int) -> int:
    """The 4n+1 frames nearest to a duration, at least one latent beyond the first frame: 4 s at 8 fps gives 33."""
    return FRAMES_PER_LATENT * max(round((seconds * fps - 1) / FRAMES_PER_LATENT), 1) + 1


def _check_prompts(request: ClipRequest) -> None:
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if len(text) > MAX_PROMPT:  # first: what follows looks at every character
            raise InvalidRequest(
                name, f"invalid_{name}", f"{name} has {len(text)} characters; the limit is {MAX_PROMPT}."
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidRequest(
                name, f"invalid_{name}", f"{name} holds half a character (a lone surrogate)."
            )
    if not request.prompt.strip():
        raise InvalidRequest("prompt", "invalid_prompt", "The prompt is empty. Say what the clip is to show.")


def _check_frames(frames: int) -> None:
    if frames < 1 or frames % FRAMES_PER_LATENT != 1:
        below = max(frames - 1, 0) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1
        raise InvalidRequest(
            "num_frames",
            "invalid_num_frames",
            f"num_frames {frames} is not 4n+1, as the VAE's four frames a latent after the first demand. Nearest: "
            f"{below} or {below + FRAMES_PER_LATENT}.",
        )


def _check_range(name: str, value: float, low: float, high: float | None, unit: str) -> None:
    bounds = f"from {low} to {high}" if high is not None else f"at least {low}"
    endless = isinstance(value, float) and not math.isfinite(value)
    if endless or value < low or (high is not None and value > high):
        code = "invalid_size" if name in ("width", "height") else f"invalid_{name}"
        raise InvalidRequest(
            name, code, f"{name} is {value}; it must be {bounds}{' ' if unit else ''}{unit}."
        )
