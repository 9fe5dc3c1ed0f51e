"""Previews: the map from latents to colours is the VAE's own, fitted, so a picture comes back as it went in."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import wan_runtime
from wan_runtime.serve.previews import Map, Previews, as_jpeg, fit, to_rgb


@pytest.fixture(scope="module")
def pipe() -> Any:
    return wan_runtime.load_pipeline()


@pytest.fixture(scope="module")
def mapping(pipe: Any) -> Map:
    return fit(pipe)


def decoded(url: str) -> np.ndarray[Any, Any]:
    kind, _, data = url.partition(",")
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_the_map_shows_a_clip_as_it_will_be_decoded(pipe: Any, mapping: Map) -> None:
    request = wan_runtime.clip_profile(pipe).request(
        "a large red circle moving right on a white background", seed=7, num_frames=5, num_inference_steps=8
    )
    estimates = []
    clip = wan_runtime.generate(
        pipe, request, lambda *_: estimates.append(pipe.scheduler.model_outputs[-1].clone())
    )
    shown = to_rgb(mapping, estimates[-1]).astype(np.float32)
    frame = clip.frames[3].astype(np.float32)  # the middle of the second latent's four frames, or nearly
    small = frame.reshape(16, 8, 16, 8, 3).mean((1, 3))
    assert shown.shape == small.shape
    assert np.corrcoef(shown.ravel(), small.ravel())[0, 1] > 0.9


def test_a_preview_is_a_small_jpeg_of_the_clips_shape(mapping: Map) -> None:
    latents = torch.zeros(1, mapping.weights.shape[0] - 1, 3, 6, 12)
    url = as_jpeg(to_rgb(mapping, latents))
    assert decoded(url).shape == (96, 192, 3)
    assert len(url) < 20_000


def test_previews_are_not_made_more_often_than_every_half_second(pipe: Any, mapping: Map) -> None:
    channels = mapping.weights.shape[0] - 1
    previews = Previews(mapping)
    pipe.scheduler.model_outputs = [None, None]
    assert previews.take(pipe) is None  # nothing has been estimated yet
    pipe.scheduler.model_outputs = [None, torch.zeros(1, channels, 2, 8, 8)]
    first = previews.take(pipe)
    assert first is not None and decoded(first).shape == (192, 192, 3)
    assert previews.take(pipe) is None
