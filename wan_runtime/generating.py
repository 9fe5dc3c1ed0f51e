"""From a request to frames: what a pipeline accepts, and the one call that makes a clip.

The pipeline is diffusers' own `WanPipeline` or `WanImageToVideoPipeline` (`wan_runtime.pipelines` assembles it). This
page adds what a caller needs around it: a callback after each denoising step that can stop the clip, and frames as
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from wan_runtime.adapters import Lora, applied
from wan_runtime.asking import ClipProfile, ClipRequest, check_request, profile_for
from wan_runtime.errors import InvalidRequest, WanRuntimeError
from wan_runtime.scheduling import scheduler_of
from wan_runtime.starting import StartImage, fitted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Pipeline: TypeAlias = (
    Any  # a diffusers.WanPipeline, whose attributes carry no types that a checker could read
)


@dataclass(frozen=True)
class Clip:
    """Frames as uint8 [num_frames, height, width, 3] in RGB, and the request that made them."""

    frames: NDArray[np.uint8]
    request: ClipRequest

    @property
    def seed(self) -> int:
        """The seed that made the frames."""
        return self.request.seed


def clip_profile(pipe: Pipeline) -> ClipProfile:
    """What `pipe` accepts, from its own configuration; the defaults are those its model was published with."""
    config = (pipe.transformer or pipe.transformer_2).config
    return profile_for(
        size_multiple=int(pipe.vae_scale_factor_spatial) * int(config.patch_size[1]),
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        two_experts=pipe.config.boundary_ratio is not None,
        expand_timesteps=bool(pipe.config.expand_timesteps),
    )


def generate(
    pipe: Pipeline,
    request: ClipRequest,
    on_step: Callable[[int, int], None] | None = None,
    *,
    image: StartImage | None = None,
    loras: Mapping[str, Lora] | None = None,
) -> Clip:
    """Makes one clip.

    `image` is the one that `request.image` names; it is scaled and cropped to the clip's size. `loras` are those among
    which `request.lora` names some (`wan_runtime.list_loras`). `on_step(done, steps)` runs after each denoising step,
    `done` counting from 1; what it raises ends the denoising there, before any decoding, and is passed on. Raises
    InvalidRequest for what the pipeline cannot make, and WanRuntimeError if the frames hold a NaN or an infinity.
    """
    check_request(request, clip_profile(pipe))
    _check_image(request, image)
    import torch

    def step_end(_: Any, index: int, __: Any, ___: Any) -> dict[str, Any]:
        if on_step is not None:
            on_step(index + 1, request.num_inference_steps)
        return {}

    given: dict[str, Any] = {} if image is None else {"image": fitted(image, request.width, request.height)}
    with (
        scheduler_of(pipe, request.flow_shift, request.num_inference_steps),
        applied(pipe, request.lora, loras or {}),
    ):
        try:
            video = _called(pipe, image)(
                **given,
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


def _check_image(request: ClipRequest, image: StartImage | None) -> None:
    given = image.sha256 if image is not None else None
    if given != request.image:
        raise InvalidRequest(
            "image",
            "invalid_image",
            f"The request names the start image {request.image}, and the one given is {given}. Ask with "
            "`image=start.sha256` and give the same `start`.",
        )


def _called(pipe: Pipeline, image: StartImage | None) -> Pipeline:
    """The pipeline to call: of a model that may start from an image and is given one (TI2V-5B), diffusers has two
    classes, and the second is put around the first one's parts."""
    import diffusers

    if image is None or isinstance(pipe, diffusers.WanImageToVideoPipeline):
        return pipe
    both: Pipeline = diffusers.WanImageToVideoPipeline(**pipe.components, **{
        name: pipe.config[name] for name in ("boundary_ratio", "expand_timesteps")
    })  # fmt: skip
    both.set_progress_bar_config(disable=True)
    return both
