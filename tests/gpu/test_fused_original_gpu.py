"""Fused blocks under the original names on a GPU: against the host's own forward, in the release's tree under autocast
and in DiffSynth-Studio's own class."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import wan_runtime
from tests.builders.wan import Sizes
from tests.hosts import diffusers, original
from tests.hosts.diffusers import error
from tests.hosts.test_original import diffsynth, dit
from wan_runtime.attention import refused
from wan_runtime.patches import _attending, _original_block

pytestmark = pytest.mark.gpu
__all__ = ["diffsynth"]  # a fixture
BF16 = torch.bfloat16
SIZES = Sizes(dim=384, ffn=1024, layers=6)
TOKENS = 48


def model(release: str, **options: Any) -> Any:
    made = original.transformer(BF16, sizes=SIZES, release=release).to("cuda").requires_grad_(False)
    for part in (made.time_embedding, made.time_projection, made.head):
        part.float()  # which the release's autocast to fp32 does in the forward
    report = wan_runtime.patch(made, **options)
    assert report.fused == options.get("fuse", True) and report.attention is not None
    return made


@torch.no_grad()
def run(
    made: Any, *, batch: int = 1, autocast: bool = True, timestep: torch.Tensor | None = None
) -> torch.Tensor:
    given = diffusers.inputs(batch=batch)
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    x, t, text = (given[name].cuda() for name in names)
    with torch.autocast("cuda", BF16, enabled=autocast):
        result: torch.Tensor = made(x, t if timestep is None else timestep.cuda(), text)
    return result


@pytest.mark.parametrize("release", ["2.1", "2.2"])
@pytest.mark.parametrize("weights", ["fp8", "nvfp4", "keep"])
@pytest.mark.parametrize("batch", [1, 2])
def test_fused_is_as_near_to_fp32_as_unfused(release: str, weights: str, batch: int) -> None:
    plain = original.transformer(sizes=SIZES, release=release).to("cuda")
    truth = run(plain, batch=batch, autocast=False)
    unfused = error(run(model(release, weights=weights, fuse=False), batch=batch), truth)
    fused = error(run(model(release, weights=weights), batch=batch), truth)
    assert fused < 1.1 * unfused + 1e-3


def test_a_timestep_a_token() -> None:
    timestep = ((torch.arange(TOKENS) >= 16) * 500.0)[None]
    expected = run(model("2.2", weights="keep", fuse=False), timestep=timestep)
    assert error(run(model("2.2", weights="keep"), timestep=timestep), expected) < 0.02


def test_every_block_ran_fused_and_unpatch_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    own = _original_block.run

    def counted(*args: Any) -> torch.Tensor:
        ran.append(1)
        return own(*args)

    monkeypatch.setattr(_original_block, "run", counted)
    made = model("2.2", weights="fp8")
    run(made)
    assert len(ran) == SIZES.layers
    wan_runtime.unpatch(made)
    run(made)
    assert len(ran) == SIZES.layers


def test_fp8_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = refused("fp8", torch.device("cuda"), BF16, 128)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(_attending, "SHORT", 0)
    plain = run(model("2.2", weights="fp8", attention="fa3"))
    made = model("2.2", weights="fp8", attention="fp8", attention_end_steps=0)
    assert 1e-6 < error(run(made), plain) < 0.05
    first = model("2.2", weights="fp8", attention="fp8", attention_end_steps=1)
    assert error(run(first), plain) < 1e-6


@pytest.mark.usefixtures("diffsynth")
@pytest.mark.parametrize("weights", ["fp8", "keep"])
def test_diffsynths_own_block(weights: str) -> None:
    module: Any = importlib.import_module("diffsynth.models.wan_video_dit")
    torch.manual_seed(0)
    made: dict[str, Any] = {}
    chosen: dict[str, dict[str, Any]] = {"own": {"fuse": False, "attention": "sdpa"}, "fused": {}}
    for name, options in chosen.items():
        torch.manual_seed(0)
        tree = dit(module)
        tree.blocks = torch.nn.ModuleList([module.DiTBlock(False, 384, 3, 1024) for _ in range(2)])
        made[name] = tree.to("cuda", BF16).eval().requires_grad_(False)
        assert wan_runtime.patch(made[name], weights=weights, **options).fused == (name == "fused")
    generator = torch.Generator("cuda").manual_seed(1)
    freqs = torch.cat([f[:TOKENS] for f in module.precompute_freqs_cis_3d(128)], 1)[:, None].cuda()
    x, context, modulation = (
        torch.randn(1, n, 384, generator=generator, device="cuda", dtype=BF16) for n in (TOKENS, 16, 6)
    )
    results = []
    with torch.no_grad():
        for tree in made.values():
            result = x
            for block in tree.blocks:
                result = block(result, context, modulation, freqs)
            results.append(result)
    assert results[1].dtype == BF16 and error(results[1], results[0]) < 0.03
