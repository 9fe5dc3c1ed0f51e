"""A fused model's patch embedding is a product of patches: what a convolution gives, laid out as the blocks read it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import wan_runtime
from tests.hosts.diffusers import error, run, transformer
from wan_runtime.patches import _patch_embedding, _wan_block
from wan_runtime.patches._patch_embedding import FusedPatches, tiles
from wan_runtime.residents import kind_of


def embedding(dtype: torch.dtype = torch.bfloat16) -> Any:
    model = transformer(dtype)
    wan_runtime.patch(model)
    _wan_block.fuse(model, "TWINS")
    return model.patch_embedding


def convolved(conv: Any, video: torch.Tensor) -> torch.Tensor:
    """In fp64."""
    return nn.functional.conv3d(
        video.double(), conv.weight.double(), conv.bias.double(), stride=conv.stride
    ).detach()


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda conv: conv,
    "a deep copy": copy.deepcopy,
    "a pickle": lambda conv: pickle.loads(pickle.dumps(conv)),
}


@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize(
    "size", [(3, 8, 6), (3, 9, 7)], ids=["whole patches", "a row and a column left over"]
)
@torch.no_grad()
def test_it_is_a_convolution(size: tuple[int, int, int], made: str) -> None:
    conv, video = COPIES[made](embedding()), torch.randn(2, 16, *size, dtype=torch.bfloat16)
    assert kind_of(conv) is FusedPatches
    truth = convolved(conv, video)
    result, exact = conv(video), conv(video.float())
    assert result.dtype is torch.bfloat16 and exact.dtype is torch.float32
    assert (exact - truth).abs().max() < 1e-5
    torch.testing.assert_close(result, truth.bfloat16())
    assert result.flatten(2).transpose(1, 2).is_contiguous()


@torch.no_grad()
def test_a_clip_without_a_batch() -> None:
    conv, video = embedding(torch.float32), torch.randn(16, 3, 8, 6)
    torch.testing.assert_close(conv(video), convolved(conv, video).float())


def test_gradients_are_a_convolution_s() -> None:
    conv, video = embedding(torch.float32), torch.randn(1, 16, 3, 8, 6, requires_grad=True)
    conv.requires_grad_()
    truth = nn.functional.conv3d(video, conv.weight, conv.bias, stride=conv.stride)
    inputs = (video, conv.weight, conv.bias)
    wanted = torch.autograd.grad(truth.square().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(conv(video).square().sum(), inputs), wanted)


@torch.no_grad()
def test_a_clip_smaller_than_a_patch_is_refused_as_a_convolution_refuses_it() -> None:
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        embedding()(torch.randn(1, 16, 3, 1, 8, dtype=torch.bfloat16))


@torch.no_grad()
def test_an_adapter_s_own_convolutions() -> None:
    """peft makes them of the class that it finds."""
    plain, twin = transformer(torch.bfloat16), transformer(torch.bfloat16)
    for model in (plain, twin):
        wan_runtime.patch(model, attention="sdpa")
    _wan_block.fuse(twin, "TWINS")
    before = run(twin, torch.bfloat16)
    for model in (plain, twin):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["patch_embedding"]))
    assert isinstance(twin.patch_embedding.lora_A["default"], FusedPatches)
    result = run(twin, torch.bfloat16)
    assert error(result, run(plain, torch.bfloat16)) < 0.005 < error(result, before)
    twin.delete_adapters("default")
    assert torch.equal(run(twin, torch.bfloat16), before)


@torch.no_grad()
def test_a_compiled_reader_is_given_the_strides_of_a_block_s_result() -> None:
    """Strides decide what is compiled anew: blocks would be compiled for the first one and again for all others."""
    model = transformer(torch.bfloat16)
    wan_runtime.patch(model)
    _wan_block.fuse(model, "TWINS")
    video = torch.randn(1, 16, 3, 8, 6, dtype=torch.bfloat16)
    plain = model.patch_embedding(video)
    model.compile_repeated_blocks(backend="eager")
    compiled = model.patch_embedding(video)
    torch.testing.assert_close(compiled, plain)
    tokens = compiled.flatten(2).transpose(1, 2).contiguous()
    assert tokens.stride() == torch.empty(tokens.shape).stride()


def test_unfusing_leaves_a_resident_and_unpatching_the_host_s_own() -> None:
    model = transformer(torch.bfloat16)
    wan_runtime.patch(model)
    _wan_block.fuse(model, "TWINS")
    _wan_block.unfuse(model)
    assert kind_of(model.patch_embedding) == "resident"
    _wan_block.fuse(model, "TWINS")
    wan_runtime.unpatch(model)
    assert (
        type(model.patch_embedding) is nn.Conv3d
        and _patch_embedding.MEMO not in model.patch_embedding.__dict__
    )


@pytest.mark.parametrize(
    "options",
    [{"stride": 1}, {"padding": (0, 1, 1)}, {"groups": 4}, {"kernel_size": 3}, {"dilation": 2}],
    ids=str,
)
def test_other_convolutions_are_no_products(options: dict[str, object]) -> None:
    assert tiles(nn.Conv3d(16, 48, (1, 2, 2), stride=(1, 2, 2)))
    plain: dict[str, object] = {"kernel_size": (1, 2, 2), "stride": (1, 2, 2)}
    assert not tiles(nn.Conv3d(16, 48, **(plain | options)))  # type: ignore[arg-type]
    assert not tiles(nn.Linear(4, 4))
