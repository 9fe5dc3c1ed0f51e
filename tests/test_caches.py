"""diffusers' caches of what blocks give, on patched models: they look up what they know of a block by its class."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

import wan_runtime
from tests.builders.wan import Sizes
from tests.hosts.diffusers import error, latents, pipeline, transformer
from tests.test_fused_block import Spy
from wan_runtime.patches import _wan_block

SIZES = Sizes(layers=4)


def first_block() -> Any:
    return FirstBlockCacheConfig(threshold=0.3)


def pyramid() -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: 500,
    )


def magnitude() -> Any:
    diffusers = pytest.importorskip("diffusers", minversion="0.37")
    return diffusers.MagCacheConfig(
        threshold=0.5, num_inference_steps=6, mag_ratios=[1.0] * 6, retention_ratio=0.1
    )


@pytest.mark.parametrize("cache", [first_block, pyramid, magnitude])
@torch.no_grad()
def test_a_cache_gives_what_it_gives_the_host_s_model(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = transformer(sizes=SIZES)
    whole = latents(pipeline(plain), steps=6)
    patched: Any = transformer(sizes=SIZES)
    wan_runtime.patch(patched, weights="keep", attention="sdpa")
    patched.to(torch.float32)
    fused = copy.deepcopy(patched)
    _wan_block.fuse(fused, "TWINS")
    plain.enable_cache(cache())
    expected = latents(pipeline(plain), steps=6)
    assert error(expected, whole) > 1e-6  # it left something out
    spy = Spy(monkeypatch)
    for model in (patched, fused, pickle.loads(pickle.dumps(fused))):
        model.enable_cache(cache())
        assert error(latents(pipeline(model), steps=6), expected) < 1e-4
        model.disable_cache()
        assert error(latents(pipeline(model), steps=6), whole) < 1e-4
    assert spy.count
