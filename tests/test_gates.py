"""Weights of an impossible size are refused in every format, and real ones of every kind pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.builders.ggml import quantised
from wan_runtime.errors import BadTensor
from wan_runtime.formats import FORMATS, BadSlot
from wan_runtime.gates import check_plain, check_size
from wan_runtime.tiny.variants import SOURCE

BLOCK, OUTSIDE = "blocks.3.ffn.0", "motion_encoder.motion_network.0"
NAMES = [name for name in FORMATS if name not in ("bf16",) and FORMATS[name].refuses(256, 256) is None]
SHAPE = (256, 256)


def _quantised(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    try:
        return FORMATS[name].quantize(weight, False)
    except (NotImplementedError, ValueError):
        pytest.skip(f"{name} is read and not written")


def _weight(std: float) -> torch.Tensor:
    return std * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("std", [1e-4, 1e-3, 0.03, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_any_trained_size_pass(name: str, std: float) -> None:
    check_size(BLOCK, name, _quantised(name, _weight(std)), SHAPE)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_zeros_passes(name: str) -> None:
    check_size(BLOCK, name, _quantised(name, torch.zeros(SHAPE)), SHAPE)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_outside_the_blocks_may_be_larger(name: str) -> None:
    slots = _quantised(name, _weight(1.0))
    check_size(OUTSIDE, name, slots, SHAPE)
    with pytest.raises(BadSlot, match="no WAN model's do"):
        check_size(BLOCK, name, slots, SHAPE)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
@pytest.mark.parametrize("name", [name for name in NAMES if "scale" in FORMATS[name].layout(*SHAPE)])
def test_an_inverted_scale_is_refused(name: str, factor: float) -> None:
    slots = _quantised(name, _weight(0.03))
    slots = {key: t * factor if t.dtype is torch.float32 else t for key, t in slots.items()}
    with pytest.raises(BadSlot, match="inverted") as caught:
        check_size(BLOCK, name, slots, SHAPE)
    assert caught.value.slot == "scale"


@pytest.mark.parametrize("name", [name for name in NAMES if "scale" in FORMATS[name].layout(*SHAPE)])
def test_one_scale_of_many_that_is_off_is_found(name: str) -> None:
    """A flipped exponent bit in the scale of a row that is not among those sampled."""
    slots = dict(FORMATS[name].quantize(_weight(0.03), True))
    if slots["scale"].shape[0] == 1:
        return
    scale = slots["scale"].clone()
    scale[scale.shape[0] // 2, 0] *= 2.0**64
    with pytest.raises(BadSlot, match="no WAN model's do"):
        check_size(BLOCK, name, {**slots, "scale": scale}, SHAPE)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_one_block_of_ggml_s_that_is_off_is_found(kind: str) -> None:
    """A flipped exponent bit in a block of a row that is not among those sampled."""
    blocks = quantised(_weight(0.03), kind)
    check_size(BLOCK, f"ggml_{kind.lower()}", {"payload": blocks}, SHAPE)
    size = blocks.shape[1] // (SHAPE[1] // 32)
    blocks[101, 3 * size + 1] ^= 0x40
    with pytest.raises(BadSlot, match="no WAN model's do"):
        check_size(BLOCK, f"ggml_{kind.lower()}", {"payload": blocks}, SHAPE)


@pytest.mark.parametrize(
    ("key", "rank", "bound"),
    [
        ("blocks.3.ffn.0.weight", 2, 40.0),
        ("model.diffusion_model.vace_blocks.0.ffn.0.weight", 2, 40.0),
        ("head.head.weight", 2, 1000.0),
        ("blocks.3.ffn.0.bias", 1, 1e6),
        ("blocks.3.modulation", 3, 1e6),
    ],
)
def test_an_unquantised_tensor_has_a_largest_value_too(key: str, rank: int, bound: float) -> None:
    path = Path("wan.safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        most = min(bound, torch.finfo(dtype).max)
        tensor = torch.zeros([3] * rank, dtype=dtype)
        for value in (most, -most):
            tensor.view(-1)[1] = value
            check_plain(path, key, tensor, "plain")
        for value in (1.01 * bound, -1.01 * bound):
            tensor.view(-1)[1] = value
            with pytest.raises(BadTensor, match=r"go beyond.*--dialect plain|infinite") as caught:
                check_plain(path, key, tensor, "plain")
            assert caught.value.key == key
            if tensor.isfinite().all():
                check_plain(path, key, tensor, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dialect", ["plain", None])
def test_no_unquantised_value_is_nan_or_infinite(value: float, dialect: str | None) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        tensor = torch.ones(4, 4, dtype=dtype)
        tensor[2, 1] = value
        with pytest.raises(BadTensor, match="NaN or infinite"):
            check_plain(Path("wan.safetensors"), "head.head.weight", tensor, dialect)


def test_the_trained_tiny_model_passes_in_every_format() -> None:
    weights = {
        k: t.float() for k, t in load_file(SOURCE).items() if t.ndim == 2 and k.startswith("blocks.0.")
    }
    assert len(weights) == 10
    for key, weight in weights.items():
        shape = (weight.shape[0], weight.shape[1])
        for name in NAMES:
            check_size(key.removesuffix(".weight"), name, _quantised(name, weight), shape)
