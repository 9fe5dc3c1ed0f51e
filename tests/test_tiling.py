"""A resident patch embedding is a product of patches: what a convolution gives, laid out as the blocks read it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wan_runtime.residents import become


def embedding(**options: object) -> nn.Conv3d:
    torch.manual_seed(0)
    return nn.Conv3d(16, 48, **({"kernel_size": (1, 2, 2), "stride": (1, 2, 2)} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "size", [(3, 8, 6), (3, 9, 7)], ids=["whole patches", "a row and a column left over"]
)
def test_a_patch_embedding_is_a_convolution(size: tuple[int, int, int]) -> None:
    conv, video = embedding(), torch.randn(2, 16, *size, dtype=torch.bfloat16)
    truth = nn.functional.conv3d(
        video.double(), conv.weight.double(), conv.bias.double(), stride=conv.stride  # type: ignore[union-attr]
    )  # fmt: skip
    become(conv, "resident")
    with torch.no_grad():
        made = conv(video)
        exact = conv(video.float())
    assert made.dtype is torch.bfloat16 and exact.dtype is torch.float32
    assert (exact - truth).abs().max() < 1e-5
    torch.testing.assert_close(made, truth.bfloat16())
    assert made.flatten(2).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    "options",
    [{"stride": 1}, {"padding": (0, 1, 1)}, {"groups": 4}, {"kernel_size": 3}, {"dilation": 2}],
    ids=str,
)
def test_other_convolutions_stay_what_they_are(options: dict[str, object]) -> None:
    conv, video = embedding(**options), torch.randn(1, 16, 5, 8, 8)
    truth = conv(video)
    become(conv, "resident")
    assert torch.equal(conv(video), truth)


def test_a_clip_without_a_batch() -> None:
    conv, video = embedding(), torch.randn(16, 3, 8, 6)
    truth = conv(video)
    become(conv, "resident")
    assert torch.equal(conv(video), truth)


def test_gradients_reach_a_patch_embedding() -> None:
    conv, video = embedding(), torch.randn(1, 16, 3, 8, 6, requires_grad=True)
    conv(video).square().sum().backward()
    assert conv.weight.grad is not None and video.grad is not None
    wanted = conv.weight.grad.clone(), video.grad.clone()
    conv.zero_grad()
    video.grad = None
    become(conv, "resident")
    conv(video).square().sum().backward()
    torch.testing.assert_close((conv.weight.grad, video.grad), wanted)
