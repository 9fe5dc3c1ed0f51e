"""Every weight format against fp64 arithmetic written from the bit fields (tests/builders/codes.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.builders.codes import E2M1, E4M3, E5M2, Floats, nearest
from tests.builders.codes import pack as nibbles
from wan_runtime.formats import FORMATS, BadSlot
from wan_runtime.formats.nvfp4 import pack, round_to_e2m1

Slots = dict[str, torch.Tensor]
OUT, INP = 96, 160


def _fp8_truth(slots: Slots, table: Floats) -> Floats:
    return np.asarray(table[slots["payload"].numpy()] * slots["scale"].double().numpy())


def _nvfp4_truth(slots: Slots) -> Floats:
    payload = slots["payload"].numpy()
    values = np.empty((payload.shape[0], payload.shape[1] * 2))
    values[:, 0::2], values[:, 1::2] = E2M1[payload % 16], E2M1[payload // 16]
    blocks = E4M3[slots["block_scale"].numpy()]
    return np.asarray(values * np.repeat(blocks, 16, axis=1) * slots["scale"].item())


# A format that is missing here fails test_every_format_has_an_oracle: add the meaning of its slots in fp64, and the
# relative L2 error that its rounding stays under on normal values.
TRUTH: dict[str, tuple[Callable[[Slots], Floats], float]] = {
    "fp8": (lambda slots: _fp8_truth(slots, E4M3), 0.03),
    "fp8_e5m2": (lambda slots: _fp8_truth(slots, E5M2), 0.06),
    "nvfp4": (_nvfp4_truth, 0.11),
}


def _weight(seed: int = 0, spread: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(spread * torch.randn(OUT, 1, generator=generator))
    return 0.05 * rows * torch.randn(OUT, INP, generator=generator)


@pytest.fixture(params=list(FORMATS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_format_has_an_oracle() -> None:
    assert set(TRUTH) == set(FORMATS)


def test_a_file_holds_the_format_it_is_named_after(name: str) -> None:
    assert FORMATS[name].name == name
    assert 0 < FORMATS[name].bits <= 16


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantised_slots_follow_the_layout(name: str, per_channel: bool) -> None:
    slots = FORMATS[name].quantize(_weight(), per_channel)
    layout = FORMATS[name].layout(OUT, INP)
    assert next(iter(layout)) == "payload"
    assert slots.keys() == layout.keys()
    for slot, (dtype, shapes) in layout.items():
        assert slots[slot].dtype == dtype
        assert tuple(slots[slot].shape) in shapes
    assert not any(tensor.dtype.itemsize == 1 and tensor.is_floating_point() for tensor in slots.values())


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_is_the_fp64_product_to_fp32_rounding(
    name: str, per_channel: bool, dtype: torch.dtype
) -> None:
    slots = FORMATS[name].quantize(_weight().to(dtype), per_channel)
    weight = FORMATS[name].dequantize(slots)
    assert weight.dtype is torch.float32
    np.testing.assert_allclose(weight.double().numpy(), TRUTH[name][0](slots), rtol=2**-22, atol=0)


def test_random_codes_mean_what_the_bits_say(name: str) -> None:
    """Every code, not only the ones that quantising picks."""
    slots = FORMATS[name].quantize(_weight(), True)
    bits = torch.arange(OUT * INP).reshape(OUT, INP)[:, : slots["payload"].shape[1]] % 256
    nan = torch.tensor(np.isfinite({"fp8": E4M3, "fp8_e5m2": E5M2}.get(name, np.zeros(256))))[bits]
    slots["payload"] = torch.where(nan, bits, 0).to(torch.uint8)
    FORMATS[name].check(slots)
    truth = TRUTH[name][0](slots)
    np.testing.assert_allclose(FORMATS[name].dequantize(slots).double().numpy(), truth, rtol=2**-22, atol=0)


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantising_loses_no_more_than_the_codes_must(name: str, per_channel: bool) -> None:
    weight = _weight(seed=1)
    slots = FORMATS[name].quantize(weight, per_channel)
    error = (FORMATS[name].dequantize(slots) - weight).norm() / weight.norm()
    assert error < TRUTH[name][1]


@pytest.mark.parametrize("weight_format", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_fp8_codes_are_the_nearest_ones(weight_format: str, per_channel: bool) -> None:
    table = {"fp8": E4M3, "fp8_e5m2": E5M2}[weight_format]
    weight = _weight(seed=2)
    slots = FORMATS[weight_format].quantize(weight, per_channel)
    amax = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().amax().reshape(1, 1)
    torch.testing.assert_close(slots["scale"], amax / table[np.isfinite(table)].max(), rtol=1e-6, atol=0)
    # The quotient is taken in fp32 as the format's rule says, so ties fall where it falls.
    quotient = (weight / slots["scale"]).double().numpy()
    np.testing.assert_array_equal(slots["payload"].numpy(), nearest(quotient, table))


def test_nvfp4_block_scales_and_codes_are_the_nearest_ones() -> None:
    weight = _weight(seed=3)
    slots = FORMATS["nvfp4"].quantize(weight, False)
    scale = slots["scale"]
    torch.testing.assert_close(scale, (weight.abs().amax() / (6 * 448)).reshape(1, 1), rtol=1e-6, atol=0)
    blocks = weight.reshape(OUT, INP // 16, 16)
    wanted = (blocks.abs().amax(-1) / 6 / scale).double().numpy()
    np.testing.assert_array_equal(slots["block_scale"].numpy(), nearest(wanted, E4M3))
    step = torch.from_numpy(E4M3[slots["block_scale"].numpy()]).float() * scale
    codes = nearest((blocks / step[..., None]).double().numpy(), E2M1).reshape(OUT, INP)
    np.testing.assert_array_equal(slots["payload"].numpy(), nibbles(codes, even_high=False))


def test_e2m1_rounds_as_a_brute_force_search_does() -> None:
    """Every tie, its neighbours one ulp away, saturation, both signs and both zeros; the nearest by exhaustion."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    edges = [
        ties,
        torch.nextafter(ties, ties * 2),
        torch.nextafter(ties, ties * 0),
        torch.linspace(0, 9, 4001),
    ]
    values = torch.cat([*edges, torch.tensor([0.0, 6.0, 448.0, 1e30])])
    values = torch.cat([values, -values])
    codes = round_to_e2m1(values).numpy()
    for value, code in zip(values.double().tolist(), codes.tolist(), strict=True):
        size = min(abs(value), 6.0)
        best = min(range(8), key=lambda c: (abs(E2M1[c] - size), c % 2))
        negative = np.signbit(value)
        assert code == best + 8 * int(negative), value


def test_the_even_element_is_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 15, 0, 7]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0xF1, 0x70]]
    one = torch.tensor([[1.0]])
    slots = {
        "payload": torch.full((1, 8), 0x52, dtype=torch.uint8),
        "block_scale": torch.tensor([[0x38]], dtype=torch.uint8),
    }
    assert FORMATS["nvfp4"].dequantize({**slots, "scale": one}).tolist() == [[1.0, 3.0] * 8]


def test_zeros_quantise_to_zeros_with_scales_that_pass(name: str) -> None:
    for per_channel in (False, True):
        slots = FORMATS[name].quantize(torch.zeros(OUT, INP), per_channel)
        FORMATS[name].check(slots)
        assert not FORMATS[name].dequantize(slots).any()


def test_a_zero_row_and_a_zero_block_beside_others_survive(name: str) -> None:
    weight = _weight()
    weight[3], weight[5, :16] = 0, 0
    for per_channel in (False, True):
        slots = FORMATS[name].quantize(weight, per_channel)
        FORMATS[name].check(slots)
        restored = FORMATS[name].dequantize(slots)
        assert not restored[3].any() and not restored[5, :16].any()
        assert restored[4].any()


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30])
def test_weights_of_any_size_stay_finite(name: str, size: float) -> None:
    slots = FORMATS[name].quantize(_weight() / _weight().abs().amax() * size, False)
    FORMATS[name].check(slots)
    assert FORMATS[name].dequantize(slots).isfinite().all()


def test_quantised_slots_pass_their_own_check(name: str) -> None:
    for per_channel in (False, True):
        FORMATS[name].check(FORMATS[name].quantize(_weight(), per_channel))


SCALES = {"NaN": float("nan"), "infinite": float("inf"), "negative": -1.0, "zero": 0.0}


@pytest.mark.parametrize("damage", SCALES)
def test_a_damaged_scale_is_refused(name: str, damage: str) -> None:
    slots = FORMATS[name].quantize(_weight(), True)
    slots["scale"][0, 0] = SCALES[damage]
    with pytest.raises(BadSlot, match=damage) as caught:
        FORMATS[name].check(slots)
    assert caught.value.slot == "scale"


def test_a_zero_scale_beside_zero_codes_is_allowed(name: str) -> None:
    weight = _weight()
    weight[0] = 0
    slots = FORMATS[name].quantize(weight, True)
    if slots["scale"].shape[0] == 1:
        slots = FORMATS[name].quantize(torch.zeros(OUT, INP), True)
    slots["scale"][0, 0] = 0.0
    FORMATS[name].check(slots)


@pytest.mark.parametrize(
    ("weight_format", "code"),
    [("fp8", 0x7F), ("fp8", 0xFF), *[("fp8_e5m2", c) for c in (0x7C, 0x7D, 0x7F, 0xFC, 0xFE)]],
)
def test_nan_and_infinite_codes_are_refused(weight_format: str, code: int) -> None:
    slots = FORMATS[weight_format].quantize(_weight(), True)
    slots["payload"][7, 9] = code
    with pytest.raises(BadSlot, match=f"1 of {OUT * INP} codes are NaN or infinite") as caught:
        FORMATS[weight_format].check(slots)
    assert caught.value.slot == "payload"


@pytest.mark.parametrize(
    ("code", "word"), [(0x7F, "NaN"), (0xFF, "NaN"), (0x81, "negative"), (0xB8, "negative")]
)
def test_a_damaged_nvfp4_block_scale_is_refused(code: int, word: str) -> None:
    slots = FORMATS["nvfp4"].quantize(_weight(), True)
    slots["block_scale"][7, 2] = code
    with pytest.raises(BadSlot, match=word) as caught:
        FORMATS["nvfp4"].check(slots)
    assert caught.value.slot == "block_scale"


@pytest.mark.parametrize("zero", [0x00, 0x80])
def test_a_zero_nvfp4_block_scale_is_refused_only_beside_codes(zero: int) -> None:
    slots = FORMATS["nvfp4"].quantize(_weight(), True)
    slots["block_scale"][7, 2] = zero
    with pytest.raises(BadSlot, match="zero beside non-zero codes") as caught:
        FORMATS["nvfp4"].check(slots)
    assert caught.value.slot == "block_scale"
    slots["payload"][7, 16:24] = 0x08  # +0 and -0
    FORMATS["nvfp4"].check(slots)


def test_sizes_a_format_cannot_hold_are_refused_with_the_size(name: str) -> None:
    refusals = {inp: FORMATS[name].refuses(64, inp) for inp in (16, 24, 30, 32, 64, 128, 160)}
    for inp, refusal in refusals.items():
        assert refusal is None or str(inp) in refusal
        if refusal is None:
            slots = FORMATS[name].quantize(torch.ones(64, inp), True)
            assert tuple(FORMATS[name].dequantize(slots).shape) == (64, inp)
    assert refusals[128] is None


def test_nvfp4_refuses_what_its_blocks_do_not_divide() -> None:
    assert "24" in str(FORMATS["nvfp4"].refuses(64, 24))
