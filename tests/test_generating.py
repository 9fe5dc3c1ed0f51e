"""Requests are refused before any work, and a pipeline makes what its request says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from wan_runtime.asking import ClipProfile, ClipRequest, check_given, check_request, frames_for
from wan_runtime.errors import InvalidRequest, WanRuntimeError
from wan_runtime.generating import Pipeline, clip_profile, generate
from wan_runtime.pipelines import load_pipeline

PROMPT = "a large red circle moving right on a black background"
PROFILE = ClipProfile(
    size_multiple=32, max_pixels=1920 * 1088, max_frames=121, two_experts=False,
    width=1280, height=704, num_frames=121, fps=24, num_inference_steps=50, guidance_scale=5.0,
)  # fmt: skip
QUICK: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    """The bundled tiny model, on the CPU in fp32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_pipeline(device="cpu")
    torch.set_num_threads(threads)


def test_a_silent_request_is_the_profiles_defaults_with_a_seed_of_its_own() -> None:
    first, second = PROFILE.request(PROMPT), PROFILE.request(PROMPT)
    shared = {field.name for field in fields(ClipRequest)} & {field.name for field in fields(ClipProfile)}
    assert {"width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale"} <= shared
    assert all(getattr(first, name) == getattr(PROFILE, name) for name in shared)
    assert first.seed != second.seed
    assert replace(first, seed=0) == replace(second, seed=0)


def test_what_is_given_wins_and_none_is_not_given() -> None:
    request = PROFILE.request(PROMPT, fps=12, seed=0, num_frames=None)
    assert (request.fps, request.seed, request.num_frames) == (12, 0, 121)


def test_the_second_expert_follows_the_first_unless_it_has_its_own() -> None:
    two = replace(PROFILE, two_experts=True, guidance_scale=4.0, guidance_scale_2=3.0)
    assert two.request(PROMPT).guidance_scale_2 == 3.0
    assert two.request(PROMPT, guidance_scale=None, guidance_scale_2=None).guidance_scale_2 == 3.0
    assert two.request(PROMPT, guidance_scale=6.0).guidance_scale_2 == 6.0
    assert two.request(PROMPT, guidance_scale=6.0, guidance_scale_2=None).guidance_scale_2 == 6.0
    assert two.request(PROMPT, guidance_scale=6.0, guidance_scale_2=2.0).guidance_scale_2 == 2.0


@pytest.mark.parametrize(
    ("given", "param", "code", "said"),
    [
        ({"width": 1270}, "width", "invalid_size", "1248 or 1280"),
        ({"height": 720}, "height", "invalid_size", "multiple of 32"),
        ({"width": 0}, "width", "invalid_size", "at least 1"),
        ({"width": 3200, "height": 1600}, "size", "invalid_size", "5120000"),
        ({"num_frames": 120}, "num_frames", "invalid_num_frames", "117 or 121"),
        ({"num_frames": 0}, "num_frames", "invalid_num_frames", "1 or 5"),
        ({"num_frames": 125}, "num_frames", "invalid_num_frames", "121"),
        ({"num_inference_steps": 201}, "num_inference_steps", "invalid_num_inference_steps", "1 to 200"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "invalid_guidance_scale", "nan"),
        ({"guidance_scale_2": 3.0}, "guidance_scale_2", "invalid_guidance_scale_2", "two experts"),
        ({"seed": -1}, "seed", "invalid_seed", "-1"),
        ({"seed": 2**63}, "seed", "invalid_seed", str(2**63)),
        ({"fps": 61}, "fps", "invalid_fps", "1 to 60"),
        ({"flow_shift": 0.0}, "flow_shift", "invalid_flow_shift", "0.01"),
        ({"negative_prompt": "x" * 4097}, "negative_prompt", "invalid_negative_prompt", "4097"),
    ],
)
def test_a_bad_value_is_refused_with_its_field_and_the_way_out(
    given: dict[str, Any], param: str, code: str, said: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        PROFILE.request(PROMPT, **given)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_frames": 18, "seed": None}, "num_frames"),
        ({"width": 64, "height": 0}, "height"),
        ({"guidance_scale_2": float("inf")}, "guidance_scale_2"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_no_pipeline_accepts_is_refused_without_one(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_given(PROMPT, **given)
    assert refused.value.param == param


def test_what_some_pipeline_may_accept_is_left_to_it() -> None:
    check_given(PROMPT, **{field.name: None for field in fields(ClipRequest) if field.name != "prompt"})
    check_given(PROMPT, width=100, height=7, num_frames=4001, guidance_scale_2=3.0, fps=60, seed=2**63 - 1)


@pytest.mark.parametrize("prompt", ["", " \n", "x" * 4097, "half \ud83d"])
def test_a_prompt_must_be_text_of_1_to_4096_characters(prompt: str) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        PROFILE.request(prompt)


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"), [(4, 8, 33), (5, 16, 81), (5, 24, 121), (0.01, 8, 5), (1, 5, 5), (2, 4, 9)]
)
def test_seconds_become_the_nearest_frame_count_of_the_vae(seconds: float, fps: int, frames: int) -> None:
    assert frames_for(seconds, fps) == frames


@pytest.mark.slow
def test_the_profile_of_the_tiny_model(pipe: Pipeline) -> None:
    profile = clip_profile(pipe)
    assert (profile.size_multiple, profile.two_experts) == (16, False)
    assert (profile.width, profile.height, profile.num_frames, profile.fps) == (128, 128, 17, 8)
    check_request(profile.request(PROMPT), profile)


def test_the_frames_are_diffusers_own(pipe: Pipeline) -> None:
    request = clip_profile(pipe).request(PROMPT, **QUICK)
    steps: list[tuple[int, int]] = []
    clip = generate(pipe, request, lambda done, of: steps.append((done, of)))
    assert steps == [(1, 2), (2, 2)]
    assert clip.frames.dtype == np.uint8
    assert (clip.frames.shape, clip.seed) == ((5, 64, 64, 3), 1)
    plain = pipe(
        prompt=PROMPT, negative_prompt="", width=64, height=64, num_frames=5, num_inference_steps=2,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(1), output_type="np",
    ).frames[0]  # fmt: skip
    assert np.array_equal(clip.frames, np.rint(plain * 255).astype(np.uint8))
    assert clip.frames.std() > 1


def test_what_the_callback_raises_stops_the_clip_there(pipe: Pipeline) -> None:
    class StopHere(Exception):
        pass

    seen = []

    def stop(done: int, _: int) -> None:
        seen.append(done)
        if done == 2:
            raise StopHere

    request = clip_profile(pipe).request(PROMPT, **{**QUICK, "num_inference_steps": 9})
    with pytest.raises(StopHere):
        generate(pipe, request, stop)
    assert seen == [1, 2]
    assert generate(pipe, clip_profile(pipe).request(PROMPT, **QUICK)).frames.shape[0] == 5  # unharmed


def test_a_flow_shift_changes_this_clip_only(pipe: Pipeline) -> None:
    profile = clip_profile(pipe)
    own = pipe.scheduler
    plain = generate(pipe, profile.request(PROMPT, **QUICK)).frames
    shifted = generate(pipe, profile.request(PROMPT, **QUICK, flow_shift=9.0)).frames
    assert not np.array_equal(plain, shifted)
    assert pipe.scheduler is own
    assert np.array_equal(plain, generate(pipe, profile.request(PROMPT, **QUICK)).frames)
    same = generate(pipe, profile.request(PROMPT, **QUICK, flow_shift=own.config.flow_shift)).frames
    assert np.array_equal(plain, same)


def test_a_size_off_the_grid_is_an_error_where_diffusers_would_round(pipe: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="multiple of 16"):
        generate(pipe, replace(clip_profile(pipe).request(PROMPT, **QUICK), width=72))


def test_frames_that_are_not_finite_are_an_error_not_a_black_clip(pipe: Pipeline) -> None:
    head = pipe.vae.decoder.conv_out.bias
    kept = head.detach().clone()
    with torch.no_grad():
        head.fill_(float("nan"))
    try:
        with pytest.raises(WanRuntimeError, match="not finite"):
            generate(pipe, clip_profile(pipe).request(PROMPT, **QUICK))
    finally:
        with torch.no_grad():
            head.copy_(kept)
