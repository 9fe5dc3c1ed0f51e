"""The fused block forward in DiffSynth-Studio's own classes, with the kernels' twins on the CPU in fp32."""

from __future__ import annotations

import copy
import importlib
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'wan-runtime[dev]')")

import wan_runtime
from tests.builders.wan import TINY, state
from tests.hosts.diffusers import error
from tests.hosts.test_original import denoise, diffsynth, dit
from tests.test_fused_original import EXACT, TOKENS, Spy, fused, spy
from wan_runtime.patches import _original_block

__all__ = ["diffsynth", "spy"]  # fixtures


@pytest.mark.usefixtures("diffsynth")
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("weights", ["fp8", "keep"])
def test_diffsynths_own_block(image: bool, weights: str, spy: Spy) -> None:
    module: Any = importlib.import_module("diffsynth.models.wan_video_dit")
    torch.manual_seed(0)
    block = module.DiTBlock(image, 256, 2, 512)
    model = dit(module)
    model.blocks = torch.nn.ModuleList([block, copy.deepcopy(block)])
    model.eval().requires_grad_(False)
    wan_runtime.patch(model, weights=weights)
    twin = fused(model)
    generator = torch.Generator().manual_seed(1)
    freqs = torch.cat([f[:TOKENS] for f in module.precompute_freqs_cis_3d(128)], 1)[:, None]
    x, context = (torch.randn(1, n, 256, generator=generator) for n in (TOKENS, 257 + 16))
    distinct_mods = torch.randn(2, 6, 256, generator=generator)
    a_token = distinct_mods[(torch.arange(TOKENS) >= 16).long()][None]
    with torch.no_grad():
        for modulation in (distinct_mods[:1], a_token):
            expected, result = x, x
            for own, ours in zip(model.blocks, twin.blocks, strict=True):
                expected = own(expected, context, modulation, freqs)
                result = ours(result, context, modulation, freqs)
            assert error(result, expected) < EXACT
    assert spy.count == 4
    batched = torch.cat((x, x * 0.5))
    with torch.no_grad():
        args = (
            context.repeat(2, 1, 1),
            a_token,
            freqs,
        )  # one row of timesteps for both, as its merged CFG gives
        assert error(twin.blocks[0](batched, *args), model.blocks[0](batched, *args)) < EXACT


@pytest.mark.usefixtures("diffsynth")
def test_diffsynths_model_and_its_attention(spy: Spy) -> None:
    module: Any = importlib.import_module("diffsynth.models.wan_video_dit")
    model = dit(module)
    model.load_state_dict(state())
    model.requires_grad_(False)
    expected = denoise(module, model, torch.float32)
    report = wan_runtime.patch(model, weights="keep", attention="sdpa")
    assert (report.host, report.attention) == ("wan_original", "sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(denoise(module, model, torch.float32), expected) < EXACT
        assert _original_block.fuse(model, "TWINS") == []
        assert error(denoise(module, model, torch.float32), expected) < EXACT
    assert spy.count == TINY.layers
    model.to(torch.bfloat16)
    spy.results.clear()
    assert error(denoise(module, model, torch.bfloat16), expected) < 0.03
    assert spy.results == [torch.bfloat16] * TINY.layers  # the host's own stream there
    wan_runtime.unpatch(model)
    assert (
        type(model.blocks[0]) is module.DiTBlock
        and type(model.blocks[0].self_attn.attn) is module.AttentionModule
    )
