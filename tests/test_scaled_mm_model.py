"""The software model of `scaled_mm`: what it takes of comfy-kitchen's own code, what it refuses, and what it multiplies
to another number; and our quantisers against comfy-kitchen's and torchao's, bit for bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import ScalingType, SwizzleType

from tests import scaled_mm_model as model
from wan_runtime.dialects._swizzle import swizzle
from wan_runtime.formats import FORMATS, nvfp4

eager = pytest.importorskip(
    "comfy_kitchen.backends.eager.quantization", reason="comfy-kitchen is not installed"
)
mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is not installed")

M, N, K = 33, 144, 192
KINDS = {"nvfp4": model.NVFP4, "mxfp8": model.MXFP8}


def drawn(tokens: int = M) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(tokens, K, generator=generator) * torch.exp(
        torch.randn(tokens, 1, generator=generator)
    )
    return rows.to(torch.bfloat16), torch.randn(N, K, generator=generator).to(torch.bfloat16)


def scale_of(x: torch.Tensor) -> torch.Tensor:
    return x.float().abs().amax() / 2688


def comfys_call(
    compute: str, monkeypatch: pytest.MonkeyPatch, *, high: bool = False, tokens: int = M
) -> dict[str, Any]:
    """What comfy-kitchen calls scaled_mm with on Blackwell, lists where it leaves single values."""
    made: list[dict[str, Any]] = []
    signature = inspect.signature(torch.nn.functional.scaled_mm)

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(dict(signature.bind(*args, **kwargs).arguments))
        return model.scaled_mm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", call)
    rows, weight = drawn(tokens)
    if compute == "nvfp4":
        scales = scale_of(rows), scale_of(weight)
        a, b = (
            eager.quantize_nvfp4(x, s, hi_first=high) for x, s in zip((rows, weight), scales, strict=True)
        )
        eager.scaled_mm_nvfp4(a[0], b[0], *scales, a[1], b[1], out_dtype=torch.bfloat16)
    else:
        a, b = eager.quantize_mxfp8(rows), eager.quantize_mxfp8(weight)
        eager.scaled_mm_mxfp8(a[0], b[0], a[1], b[1], out_dtype=torch.bfloat16)
    lists = ("scale_a", "scale_b", "scale_recipe_a", "scale_recipe_b", "swizzle_a", "swizzle_b")
    return {name: model._list(value) if name in lists else value for name, value in made[0].items()}


def apart(ours: torch.Tensor) -> float:
    rows, weight = drawn(ours.shape[0])
    truth = rows.double() @ weight.double().T
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("compute", "high", "within"), [("nvfp4", 0, 0.15), ("nvfp4", 1, 0.15), ("mxfp8", 0, 0.045)]
)
def test_comfy_kitchens_own_call_is_taken_and_right(
    compute: str, high: bool, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either order of nibbles, as long as both operands have it: a pair lies within one block."""
    assert apart(model.scaled_mm(**comfys_call(compute, monkeypatch, high=high))) < within


Change = Callable[[dict[str, Any]], dict[str, Any]]
T = ScalingType
NO = SwizzleType.NO_SWIZZLE


def plain_order(kind: model.Kind, scales: torch.Tensor, tokens: int = M) -> torch.Tensor:
    """The same scales row by row, padded to the same size."""
    held = torch.from_numpy(model._tiled("", kind, scales, tokens, K // kind.block))
    padded = torch.nn.functional.pad(held, (0, -held.shape[1] % 4, 0, -tokens % 128))
    return padded.flatten().view(scales.dtype)


def kind_of(call: dict[str, Any]) -> model.Kind:
    return next(kind for kind in KINDS.values() if kind.codes == call["mat_a"].dtype)


def swapped(codes: torch.Tensor) -> torch.Tensor:
    bytes_ = codes.view(torch.uint8)
    return ((bytes_ >> 4) | (bytes_ << 4)).view(codes.dtype)


def inverted(powers: torch.Tensor) -> torch.Tensor:
    return torch.where(powers > 0, 254 - powers, 0)


REFUSED: dict[str, Change] = {
    "fast accumulation": lambda c: {"use_fast_accum": True},
    "an fp32 bias": lambda c: {"bias": torch.zeros(N)},
    "a short bias": lambda c: {"bias": torch.zeros(N - 1, dtype=torch.bfloat16)},
    "an fp32 result with a bias": lambda c: {"bias": torch.zeros(N), "output_dtype": torch.float32},
    "an fp8 result": lambda c: {"output_dtype": torch.float8_e4m3fn},
    "codes as bytes": lambda c: {"mat_a": c["mat_a"].view(torch.uint8)},
    "operands of two kinds": lambda c: {"mat_b": c["mat_b"].view(torch.float8_e5m2)},
    "a weight in rows": lambda c: {"mat_b": c["mat_b"].view(torch.uint8).contiguous().view(c["mat_b"].dtype)},
    "rows that lie apart": lambda c: {"mat_a": c["mat_a"][:, ::2]},
    "rows of 8 bytes more": lambda c: {"mat_a": torch.zeros(M, 104, dtype=torch.uint8).view(c["mat_a"].dtype)},
    "another contraction": lambda c: {"mat_a": torch.zeros(M, 64, dtype=torch.uint8).view(c["mat_a"].dtype)},
    "8 columns less": lambda c: {"mat_b": c["mat_b"].t()[:-8].t()},
    "one scale less": lambda c: {"scale_a": c["scale_a"][:-1]},
    "one scale more": lambda c: {"scale_b": [*c["scale_b"], torch.ones(1)]},
    "scales as bytes": lambda c: {"scale_a": [c["scale_a"][0].view(torch.uint8), *c["scale_a"][1:]]},
    "scales cut short": lambda c: {"scale_a": [c["scale_a"][0].flatten()[:-4], *c["scale_a"][1:]]},
    "scales in plain order": lambda c: {
        "scale_a": [plain_order(kind_of(c), c["scale_a"][0]), *c["scale_a"][1:]]
    },
    "no recipe": lambda c: {"scale_recipe_a": []},
    "another block": lambda c: {"scale_recipe_b": [T.BlockWise1x128, *c["scale_recipe_b"][1:]]},
    "a recipe before": lambda c: {"scale_recipe_a": [T.TensorWise, *c["scale_recipe_a"]]},
    "no order": lambda c: {"swizzle_a": None},
    "orders the other way round": lambda c: {"swizzle_b": [NO, *c["swizzle_b"][:-1]]},
    "an order too many": lambda c: {"swizzle_a": [*c["swizzle_a"], NO]},
    "a contraction by name": lambda c: {"contraction_dim": (1, 0)},
}  # fmt: skip
REFUSED_NVFP4: dict[str, Change] = {
    "a bf16 scale a tensor": lambda c: {"scale_a": [c["scale_a"][0], c["scale_a"][1].bfloat16()]},
    "a scale a row beside": lambda c: {"scale_a": [c["scale_a"][0], torch.ones(M, 1)]},
    "recipes the other way round": lambda c: {"scale_recipe_a": c["scale_recipe_a"][::-1]},
    "negative block scales": lambda c: {"scale_a": [-c["scale_a"][0].float(), c["scale_a"][1]]},
    "negative e4m3 scales": lambda c: {
        "scale_a": [(c["scale_a"][0].view(torch.uint8) | 0x80).view(torch.float8_e4m3fn), c["scale_a"][1]]
    },
}  # fmt: skip
WRONG_NVFP4: dict[str, Change] = {
    "an inverted scale a tensor": lambda c: {"scale_a": [c["scale_a"][0], 1 / c["scale_a"][1]]},
    "one operand's nibbles swapped": lambda c: {"mat_a": swapped(c["mat_a"])},
    "inverted block scales": lambda c: {
        "scale_b": [(1 / c["scale_b"][0].float()).nan_to_num(0, 0, 0).to(torch.float8_e4m3fn), c["scale_b"][1]]
    },
    "no scale a tensor": lambda c: {"scale_a": [c["scale_a"][0], torch.ones(1)]},
}  # fmt: skip
WRONG_MXFP8: dict[str, Change] = {
    "inverted block scales": lambda c: {
        "scale_b": [inverted(c["scale_b"][0].view(torch.uint8)).view(torch.float8_e8m0fnu)]
    },
    "NaN in a block scale": lambda c: {
        "scale_b": [c["scale_b"][0].view(torch.uint8).index_fill(0, torch.tensor([0]), 255).view(torch.float8_e8m0fnu)]
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("compute", "change"),
    [
        *((compute, name) for compute in KINDS for name in REFUSED),
        *(("nvfp4", name) for name in REFUSED_NVFP4),
    ],
)
def test_a_call_that_is_not_right_is_refused(
    compute: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = comfys_call(compute, monkeypatch)
    wrong = (REFUSED | REFUSED_NVFP4)[change](call)
    with pytest.raises(model.Refused):
        model.scaled_mm(**{**call, **wrong})


@pytest.mark.parametrize(
    ("compute", "change"), [*(("nvfp4", name) for name in WRONG_NVFP4), *(("mxfp8", n) for n in WRONG_MXFP8)]
)
def test_what_no_check_can_see_is_another_number(
    compute: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = comfys_call(compute, monkeypatch)
    wrong = (WRONG_NVFP4 if compute == "nvfp4" else WRONG_MXFP8)[change](call)
    assert not apart(model.scaled_mm(**{**call, **wrong})) < 0.3


def test_another_order_of_whole_tiles_is_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no padding there to tell the order by. K is whole tiles of NVFP4's blocks alone."""
    call = comfys_call("nvfp4", monkeypatch, tokens=128)
    wrong = [plain_order(model.NVFP4, call["scale_a"][0], 128), call["scale_a"][1]]
    assert apart(model.scaled_mm(**call)) < 0.15
    assert not apart(model.scaled_mm(**{**call, "scale_a": wrong})) < 0.3


def test_every_code_has_the_value_that_torch_gives_it() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    grid = every.reshape(16, 16).numpy()
    assert torch.equal(
        torch.from_numpy(model._e4m3(grid)).nan_to_num(999),
        every.view(torch.float8_e4m3fn).double().reshape(16, 16).nan_to_num(999),
    )
    assert torch.equal(
        torch.from_numpy(model._e8m0(grid)).nan_to_num(-1),
        every.view(torch.float8_e8m0fnu).double().reshape(16, 16).nan_to_num(-1),
    )
    pairs = torch.from_numpy(model._e2m1_pairs(grid)).reshape(-1, 2)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert pairs[:8, 0].tolist() == magnitudes and pairs[8:16, 0].tolist() == [-m for m in magnitudes]
    assert pairs[::16, 1][:8].tolist() == magnitudes


def test_nvfp4_is_comfy_kitchens_and_torchaos_bit_for_bit() -> None:
    for x in drawn():
        scale = scale_of(x)
        ours = nvfp4.quantize_by(x, scale.reshape(1, 1))
        codes, scales = eager.quantize_nvfp4(x, scale, hi_first=False)
        assert torch.equal(ours["payload"], codes)
        assert torch.equal(swizzle(ours["block_scale"]), scales.view(torch.uint8))
        their_scales, their_codes = nv.nvfp4_quantize(x, per_tensor_scale=scale)
        assert torch.equal(ours["block_scale"], their_scales.view(torch.uint8))
        assert torch.equal(
            swizzle(ours["block_scale"]).flatten(), nv.to_blocked(their_scales.view(torch.uint8))
        )
        # torchao multiplies by a rounded reciprocal where comfy-kitchen and we divide: another code in a tie alone.
        step = (their_scales.double() * scale.double()).repeat_interleave(16, 1)
        fourfold = (x.double() / step).abs() * 4
        tie = (fourfold - fourfold.round()).abs() < 1e-5
        same = torch.from_numpy(model._e2m1_pairs((ours["payload"] ^ their_codes).numpy())) == 0
        assert (same | tie).all() and same.double().mean() > 0.99


def test_mxfp8_is_comfy_kitchens_and_torchaos_bit_for_bit() -> None:
    for x in drawn():
        ours = FORMATS["mxfp8"].quantize(x, True)
        codes, scales = eager.quantize_mxfp8(x)
        assert torch.equal(ours["payload"], codes.view(torch.uint8))
        assert torch.equal(swizzle(ours["block_scale"]), scales.view(torch.uint8))
        # torchao's RCEIL is the rule that saturates nothing; its default, the OCP's floor, clips.
        their_scales, their_codes = mx.to_mx(x, torch.float8_e4m3fn, 32, mx.ScaleCalculationMode.RCEIL)
        assert torch.equal(ours["payload"], their_codes.view(torch.uint8))
        assert torch.equal(ours["block_scale"], their_scales.view(torch.uint8))
