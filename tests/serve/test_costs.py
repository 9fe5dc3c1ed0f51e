"""Predictions: the work of a pass from the model's own configuration, and what jobs have taken."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from wan_runtime import ClipProfile, ClipRequest
from wan_runtime.serve.costs import BOUNDS, Speed, clip_seconds, learned, operations, step_seconds, tokens_of

SPEED = Speed(
    per_token=1e6, per_pair=1e2, operations_a_second=1e9, seconds_a_pixel=1e-6, other_seconds=0.5
)  # fmt: skip
PROFILE = ClipProfile(
    size_multiple=16, max_pixels=10**7, max_frames=257, two_experts=False, width=832, height=480, num_frames=81,
    fps=16, num_inference_steps=50, guidance_scale=5.0,
)  # fmt: skip
CLIP: ClipRequest = PROFILE.request("a circle", seed=1)


def test_tokens_are_those_of_the_published_model() -> None:
    assert tokens_of(CLIP, 16) == 32760  # Wan2.1 at 832x480 with 81 frames: 21 latent frames of 30 x 52


def test_a_pass_of_wan_14b_has_the_operations_of_its_matrices() -> None:
    config = SimpleNamespace(num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824)
    per_token, per_pair = operations(config)
    # twice the parameters of the blocks that see every token: 14.29e9 in all, less keys and values of the text (2.1e9)
    assert per_token / 2 == pytest.approx(12.0e9, rel=0.03)
    assert per_pair == 40 * 4 * 5120


def test_guidance_doubles_a_step_and_attention_grows_with_the_square() -> None:
    one = step_seconds(SPEED, replace(CLIP, guidance_scale=1.0), 16)
    assert step_seconds(SPEED, CLIP, 16) == pytest.approx(2 * one)
    assert one == pytest.approx((32760 * 1e6 + 32760**2 * 1e2) / 1e9)


def test_a_clip_takes_its_steps_its_pixels_and_the_rest() -> None:
    steps = 50 * step_seconds(SPEED, CLIP, 16)
    assert clip_seconds(SPEED, CLIP, PROFILE) == pytest.approx(0.5 + steps + 832 * 480 * 81 * 1e-6)


def test_jobs_correct_the_prediction_until_it_is_right() -> None:
    speed = SPEED
    for _ in range(30):
        predicted = clip_seconds(speed, CLIP, PROFILE)
        speed = replace(speed, correction=learned(speed, predicted, 1000.0))
    assert clip_seconds(speed, CLIP, PROFILE) == pytest.approx(1000.0, rel=1e-3)


def test_one_odd_job_is_bounded() -> None:
    assert learned(SPEED, 1e-9, 1e9) == BOUNDS[1]
    assert learned(replace(SPEED, correction=BOUNDS[0]), 1e9, 0.0) == BOUNDS[0]
