"""What a clip will take, predicted from what a small one took when the model was warmed up, and from the jobs since.

The transformer's work is counted as it is computed: matrix products grow with the tokens, attention with their square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wan_runtime import ClipProfile, ClipRequest

LEARNING = 0.3  # weight of the newest job in the correction
BOUNDS = (0.02, 50.0)  # of the correction: one odd job must not make every later one look free


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast this model runs here. A pass is one evaluation of the transformer, of which guidance needs two a step.

    `per_token` and `per_pair` are operations of one pass; pixels are those of all frames; times are in seconds.
    """

    per_token: float
    per_pair: float
    operations_a_second: float
    seconds_a_pixel: float
    other_seconds: float
    correction: float = 1.0


def tokens_of(request: ClipRequest, size_multiple: int) -> int:
    """How many tokens the transformer sees: one for each square of `size_multiple` pixels of each latent frame."""
    frames = (request.num_frames - 1) // 4 + 1
    return frames * (request.width // size_multiple) * (request.height // size_multiple)


def pixels_of(request: ClipRequest) -> int:
    """The pixels of all frames."""
    return request.width * request.height * request.num_frames


def operations(config: Any) -> tuple[float, float]:
    """One pass's operations per token and per pair of tokens, from a Wan transformer's configuration."""
    dim = int(config.num_attention_heads) * int(config.attention_head_dim)
    layers = int(config.num_layers)
    per_token = layers * 2 * (6 * dim * dim + 2 * dim * int(config.ffn_dim))
    return float(per_token), float(layers * 4 * dim)


def step_seconds(speed: Speed, request: ClipRequest, size_multiple: int) -> float:
    """How long one denoising step of this clip is predicted to take."""
    tokens = tokens_of(request, size_multiple)
    passes = 2 if request.guidance_scale > 1 else 1
    work = passes * (speed.per_token * tokens + speed.per_pair * tokens**2)
    return speed.correction * work / speed.operations_a_second


def tail_seconds(speed: Speed, request: ClipRequest) -> float:
    """How long decoding and encoding this clip are predicted to take."""
    return speed.correction * speed.seconds_a_pixel * pixels_of(request)


def clip_seconds(speed: Speed, request: ClipRequest, profile: ClipProfile) -> float:
    """How long this clip is predicted to take from its start to its file."""
    steps = request.num_inference_steps * step_seconds(speed, request, profile.size_multiple)
    return speed.correction * speed.other_seconds + steps + tail_seconds(speed, request)


def learned(speed: Speed, predicted: float, actual: float) -> float:
    """The correction after a job that was `predicted` to take so many seconds (by `speed`) took `actual` ones."""
    seen = speed.correction * actual / max(predicted, 1e-6)
    low, high = BOUNDS
    return min(max((1 - LEARNING) * speed.correction + LEARNING * seen, low), high)
