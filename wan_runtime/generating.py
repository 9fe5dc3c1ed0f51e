"""From a request to frames: what a clip is asked with, what a pipeline accepts, and the one call that makes it.

The pipeline is diffusers' own `WanPipeline` (`wan_runtime.pipelines` assembles it). This page adds what a caller needs
around it: requests that are checked before any work is done, a callback after each denoising step that can stop the
clip, and frames as bytes. diffusers would round a bad size or frame count and go on; here that is an error.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

from wan_runtime.errors import InvalidRequest, WanRuntimeError
from wan_runtime.scheduling import scheduler_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Pipeline: TypeAlias = (
    Any  # a diffusers.WanPipeline, whose attributes carry no types that a checker could read
)
MAX_STEPS = 200
MAX_FPS = 60
MAX_PROMPT = 4096  # characters; UMT5 reads 512 tokens and cuts the rest
MAX_SEED = 2**63 - 1
FRAMES_PER_LATENT = 4  # the causal VAE: one frame, then four a latent, hence 4n+1


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """One clip, fully decided: the same request on the same pipeline and device gives the same frames.

    Sizes are in pixels, `fps` in frames a second; `seed` draws the first noise on the CPU, so that it does not depend
    on the device. `guidance_scale_2` is the second expert's (Wan2.2 A14B) and `flow_shift` replaces the scheduler's;
    None keeps the pipeline's own. Raises InvalidRequest for values that no pipeline accepts.
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

    @property
    def seconds(self) -> float:
        """How long the clip plays."""
        return self.num_frames / self.fps


@dataclass(frozen=True, kw_only=True)
class ClipProfile:
    """What one pipeline accepts, and what it uses where a request is silent.

    `size_multiple` is VAE scale x patch: 16 for the Wan2.1 VAE, 32 for Wan2.2 TI2V-5B. `max_pixels` is width x height.
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

    def request(self, prompt: str, **given: Any) -> ClipRequest:
        """A checked request: `given` where it is not None, this profile's defaults elsewhere, a random seed if none.

        Raises InvalidRequest, naming the field, for what this pipeline cannot do.
        """
        known = {field.name for field in fields(ClipRequest)}
        values = {name: getattr(self, name) for name in known if hasattr(self, name)}
        values["seed"] = secrets.randbelow(2**31)  # 31 bits: every client can hold it
        values.update({name: value for name, value in given.items() if value is not None})
        asked, second = given.get("guidance_scale"), given.get("guidance_scale_2")
        if self.two_experts and asked is not None and second is None:
            values["guidance_scale_2"] = values["guidance_scale"]
        request = ClipRequest(prompt=prompt, **values)
        check_request(request, self)
        return request


@dataclass(frozen=True)
class Clip:
    """Frames as uint8 [num_frames, height, width, 3] in RGB, and the request that made them."""

    frames: NDArray[np.uint8]
    request: ClipRequest

    @property
    def seed(self) -> int:
        """The seed that made the frames."""
        return self.request.seed


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


def frames_for(seconds: float, fps: int) -> int:
    """The 4n+1 frames nearest to a duration, at least one latent beyond the first frame: 4 s at 8 fps gives 33."""
    return FRAMES_PER_LATENT * max(round((seconds * fps - 1) / FRAMES_PER_LATENT), 1) + 1


def clip_profile(pipe: Pipeline) -> ClipProfile:
    """What `pipe` accepts, from its own configuration; the defaults are those its model was published with."""
    config = (pipe.transformer or pipe.transformer_2).config
    scale = int(pipe.vae_scale_factor_spatial) * int(config.patch_size[1])
    two = pipe.config.boundary_ratio is not None
    common: dict[str, Any] = {"size_multiple": scale, "two_experts": two}
    if config.text_dim == 128:  # the bundled tiny model
        second = 4.0 if two else None
        return ClipProfile(
            **common, width=128, height=128, num_frames=17, fps=8, num_inference_steps=20, guidance_scale=4.0,
            guidance_scale_2=second, max_pixels=256 * 256, max_frames=65,
        )  # fmt: skip
    common |= {"max_pixels": 1920 * 1088, "max_frames": 257}
    if config.in_channels == 48:  # Wan2.2 TI2V-5B
        return ClipProfile(
            **common,
            width=1280,
            height=704,
            num_frames=121,
            fps=24,
            num_inference_steps=50,
            guidance_scale=5.0,
        )
    if two:  # Wan2.2 T2V-A14B
        return ClipProfile(
            **common, width=1280, height=720, num_frames=81, fps=16, num_inference_steps=40, guidance_scale=4.0,
            guidance_scale_2=3.0,
        )  # fmt: skip
    return ClipProfile(
        **common, width=832, height=480, num_frames=81, fps=16, num_inference_steps=50, guidance_scale=5.0
    )


def generate(pipe: Pipeline, request: ClipRequest, on_step: Callable[[int, int], None] | None = None) -> Clip:
    """Makes one clip.

    `on_step(done, steps)` runs after each denoising step, `done` counting from 1; what it raises ends the denoising
    there, before any decoding, and is passed on. Raises InvalidRequest for what the pipeline cannot make, and
    WanRuntimeError if the frames hold a NaN or an infinity.
    """
    check_request(request, clip_profile(pipe))
    import torch

    def step_end(_: Any, index: int, __: Any, ___: Any) -> dict[str, Any]:
        if on_step is not None:
            on_step(index + 1, request.num_inference_steps)
        return {}

    with scheduler_of(pipe, request.flow_shift, request.num_inference_steps):
        try:
            video = pipe(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                height=request.height,
                width=request.width,
                num_frames=request.num_frames,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                guidance_scale_2=request.guidance_scale_2,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                output_type="pt",
                callback_on_step_end=step_end,
            ).frames[0]
        except BaseException:
            pipe.maybe_free_model_hooks()  # the pipeline frees its offload hooks only when it reaches its end
            raise
    if not bool(torch.isfinite(video).all()):
        bad = int((~torch.isfinite(video)).sum())
        raise WanRuntimeError(
            f"The pipeline made {bad} pixels that are not finite, of {video.numel()}: the checkpoint, the text encoder "
            "or the VAE is damaged, or its dtype overflows. Try --compute bf16, then `wan-runtime inspect` the file."
        )
    frames = (video.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return Clip(frames=frames, request=request)


def _check_prompts(request: ClipRequest) -> None:
    if not request.prompt.strip():
        raise InvalidRequest("prompt", "invalid_prompt", "The prompt is empty. Say what the clip is to show.")
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InvalidRequest(
                name, f"invalid_{name}", f"{name} holds half a character (a lone surrogate)."
            )
        if len(text) > MAX_PROMPT:
            raise InvalidRequest(
                name, f"invalid_{name}", f"{name} has {len(text)} characters; the limit is {MAX_PROMPT}."
            )


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
    if not math.isfinite(value) or value < low or (high is not None and value > high):
        code = "invalid_size" if name in ("width", "height") else f"invalid_{name}"
        raise InvalidRequest(
            name, code, f"{name} is {value}; it must be {bounds}{' ' if unit else ''}{unit}."
        )
