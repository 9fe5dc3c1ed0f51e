"""Every weight format against fp64 arithmetic written from the bit fields (tests/builders/codes.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.builders.codes import E2M1, E3M2, E4M3, E5M2, E8M0, INT8, Floats, nearest, pack6
from tests.builders.codes import pack as nibbles
from wan_runtime.formats import FORMATS, BadSlot
from wan_runtime.formats._e2m1 import pack, round_to_e2m1
from wan_runtime.formats.mxfp6 import round_to_e3m2

Slots = dict[str, torch.Tensor]
OUT, INP = 96, 160


def _scaled_truth(slots: Slots, table: Floats) -> Floats:
    return np.asarray(table[slots["payload"].numpy()] * slots["scale"].double().numpy())


def _blocks(slots: Slots, rows: int, cols: int) -> Floats:
    """The scale of each weight, where a scale covers rows x cols."""
    scale = slots["scale"].double().numpy()
    out, inp = slots["payload"].shape
    return np.asarray(scale[np.arange(out)[:, None] // rows, np.arange(inp)[None] // cols])


def _block_truth(slots: Slots, table: Floats) -> Floats:
    return np.asarray(table[slots["payload"].numpy()] * _blocks(slots, 128, 128))


def _nibble_codes(payload: torch.Tensor) -> NDArray[np.uint8]:
    byte = payload.numpy()
    codes = np.empty((byte.shape[0], byte.shape[1] * 2), dtype=np.uint8)
    codes[:, 0::2], codes[:, 1::2] = byte % 16, byte // 16
    return codes


def _nvfp4_truth(slots: Slots) -> Floats:
    values = E2M1[_nibble_codes(slots["payload"])]
    blocks = E4M3[slots["block_scale"].numpy()]
    return np.asarray(values * np.repeat(blocks, 16, axis=1) * slots["scale"].item())


def _mx_truth(slots: Slots, values: Floats) -> Floats:
    return np.asarray(values * np.repeat(E8M0[slots["block_scale"].numpy()], 32, axis=1))


def _mxfp6_truth(slots: Slots) -> Floats:
    """Each row as one little-endian number, six bits a code."""
    numbers = [int.from_bytes(bytes(row), "little") for row in slots["payload"].tolist()]
    count = slots["payload"].shape[1] * 8 // 6
    return _mx_truth(
        slots, E3M2[[[number >> 6 * place & 63 for place in range(count)] for number in numbers]]
    )


def _int4_truth(slots: Slots) -> Floats:
    codes = _nibble_codes(slots["payload"]).astype(np.float64)
    group = codes.shape[1] // slots["scale"].shape[1]
    scale, zero = (np.repeat(slots[slot].double().numpy(), group, axis=1) for slot in ("scale", "zero"))
    return np.asarray((codes - 8) * scale + zero)


# A format that is missing here fails test_every_format_has_an_oracle: add the meaning of its slots in fp64, and the
# relative L2 error that its rounding stays under on normal values.
TRUTH: dict[str, tuple[Callable[[Slots], Floats], float]] = {
    "fp8": (lambda slots: _scaled_truth(slots, E4M3), 0.03),
    "fp8_block": (lambda slots: _block_truth(slots, E4M3), 0.03),
    "fp8_e5m2": (lambda slots: _scaled_truth(slots, E5M2), 0.06),
    "fp8_e5m2_block": (lambda slots: _block_truth(slots, E5M2), 0.06),
    "int4": (_int4_truth, 0.12),
    "int8": (lambda slots: _scaled_truth(slots, INT8), 0.02),
    "int8_block": (lambda slots: _block_truth(slots, INT8), 0.02),
    "mxfp4": (lambda slots: _mx_truth(slots, E2M1[_nibble_codes(slots["payload"])]), 0.16),
    "mxfp6": (_mxfp6_truth, 0.08),
    "mxfp8": (lambda slots: _mx_truth(slots, E4M3[slots["payload"].numpy()]), 0.04),
    "nvfp4": (_nvfp4_truth, 0.11),
}
TABLES = {"fp8": E4M3, "fp8_block": E4M3, "mxfp8": E4M3, "fp8_e5m2": E5M2, "fp8_e5m2_block": E5M2}
FP32_SCALES = [name for name in TRUTH if name not in ("mxfp4", "mxfp6", "mxfp8")]


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
    nan = torch.tensor(np.isfinite(TABLES.get(name, np.zeros(256))))[bits]
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


@pytest.mark.parametrize("name", FP32_SCALES)
@pytest.mark.parametrize("damage", SCALES)
def test_a_damaged_scale_is_refused(name: str, damage: str) -> None:
    slots = FORMATS[name].quantize(_weight(), True)
    slots["scale"][0, 0] = SCALES[damage]
    with pytest.raises(BadSlot, match=damage) as caught:
        FORMATS[name].check(slots)
    assert caught.value.slot == "scale"


@pytest.mark.parametrize("name", FP32_SCALES)
def test_a_zero_scale_beside_zero_codes_is_allowed(name: str) -> None:
    weight = _weight()
    weight[0] = 0
    slots = FORMATS[name].quantize(weight, True)
    if slots["scale"].shape[0] < OUT:
        slots = FORMATS[name].quantize(torch.zeros(OUT, INP), True)
    slots["scale"][0, 0] = 0.0
    FORMATS[name].check(slots)


NOT_NUMBERS = {"e4m3": (0x7F, 0xFF), "e5m2": (0x7C, 0x7D, 0x7F, 0xFC, 0xFE)}


@pytest.mark.parametrize(
    ("weight_format", "code"),
    [
        (name, code)
        for name, table in TABLES.items()
        for code in NOT_NUMBERS["e4m3" if table is E4M3 else "e5m2"]
    ],
)
def test_nan_and_infinite_codes_are_refused(weight_format: str, code: int) -> None:
    slots = FORMATS[weight_format].quantize(_weight(), True)
    slots["payload"][7, 9] = code
    with pytest.raises(BadSlot, match=f"codes in 1 of its {OUT} rows are NaN or infinite") as caught:
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


BLOCKED = ("fp8_block", "fp8_e5m2_block", "int8_block")


@pytest.mark.parametrize("weight_format", BLOCKED)
@pytest.mark.parametrize(
    ("size", "rows", "cols"),
    [
        ((256, 384), 128, 128),
        ((200, 300), 128, 128),  # the last blocks are cut short
        ((192, 160), 64, 64),
        ((96, 96), 32, 32),
        ((96, 160), 1, 64),
        ((64, 256), 1, 32),
        ((64, 64), 128, 128),
    ],
)
def test_the_scales_of_blocks_say_their_size(
    weight_format: str, size: tuple[int, int], rows: int, cols: int
) -> None:
    """Every producer's block size, against an element-by-element look-up of its scale."""
    out, inp = size
    generator = torch.Generator().manual_seed(4)
    shape = (-(-out // rows), -(-inp // cols))
    assert shape in FORMATS[weight_format].layout(out, inp)["scale"][1]
    slots = {
        "payload": torch.randint(0, 0x70, size, generator=generator, dtype=torch.uint8),
        "scale": torch.rand(shape, generator=generator) + 0.5,
    }
    table = {"fp8_block": E4M3, "fp8_e5m2_block": E5M2, "int8_block": INT8}[weight_format]
    truth = table[slots["payload"].numpy()] * _blocks(slots, rows, cols)
    restored = FORMATS[weight_format].dequantize(slots)
    np.testing.assert_allclose(restored.double().numpy(), truth, rtol=2**-22, atol=0)
    slots["scale"][-1, -1] = 0
    with pytest.raises(BadSlot, match="zero beside non-zero codes"):
        FORMATS[weight_format].check(slots)
    slots["payload"][(shape[0] - 1) * rows :, (shape[1] - 1) * cols :] = 0
    FORMATS[weight_format].check(slots)


@pytest.mark.parametrize("weight_format", BLOCKED)
def test_each_block_is_quantised_by_its_own_amax(weight_format: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(200, 300, generator=generator)
    top = {"fp8_block": 448, "fp8_e5m2_block": 57344, "int8_block": 127}[weight_format]
    wanted = [[weight[r : r + 128, c : c + 128].abs().max() / top for c in (0, 128, 256)] for r in (0, 128)]
    torch.testing.assert_close(
        FORMATS[weight_format].quantize(weight, True)["scale"], torch.tensor(wanted), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("per_channel", [False, True])
def test_int8_codes_are_the_nearest_ones(per_channel: bool) -> None:
    weight = _weight(seed=6)
    slots = FORMATS["int8"].quantize(weight, per_channel)
    amax = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().amax().reshape(1, 1)
    torch.testing.assert_close(slots["scale"], amax / 127, rtol=1e-6, atol=0)
    wanted = np.rint((weight / slots["scale"]).double().numpy()).astype(np.int8)
    np.testing.assert_array_equal(slots["payload"].view(torch.int8).numpy(), wanted)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_int4_groups_are_told_by_the_scales_and_offsets_are_added(groups: int) -> None:
    generator = torch.Generator().manual_seed(7)
    assert (32, groups) in FORMATS["int4"].layout(32, 128)["scale"][1]
    slots = {
        "payload": torch.randint(0, 256, (32, 64), generator=generator, dtype=torch.uint8),
        "scale": torch.rand(32, groups, generator=generator) + 0.5,
        "zero": torch.randn(32, groups, generator=generator),
    }
    FORMATS["int4"].check(slots)
    restored = FORMATS["int4"].dequantize(slots)
    np.testing.assert_allclose(restored.double().numpy(), _int4_truth(slots), rtol=2**-20, atol=2**-20)


def test_an_int4_byte_worked_out_by_hand() -> None:
    """0x3F: the even element 15 - 8 = 7 from the low nibble, the odd one 3 - 8 = -5."""
    slots = {"payload": torch.tensor([[0x3F]], dtype=torch.uint8)}
    slots |= {"scale": torch.tensor([[0.5]]), "zero": torch.tensor([[0.25]])}
    assert FORMATS["int4"].dequantize(slots).tolist() == [[3.75, -2.25]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_int4_offset_is_refused(value: float) -> None:
    slots = FORMATS["int4"].quantize(_weight(), True)
    slots["zero"][3, 0] = value
    with pytest.raises(BadSlot, match="offset is NaN or infinite") as caught:
        FORMATS["int4"].check(slots)
    assert caught.value.slot == "zero"


MX = {"mxfp8": (E4M3, 448.0), "mxfp6": (E3M2, 28.0), "mxfp4": (E2M1, 6.0)}


@pytest.mark.parametrize("weight_format", MX)
def test_mx_scales_are_the_smallest_that_hold_the_block_and_codes_the_nearest(weight_format: str) -> None:
    table, top = MX[weight_format]
    weight = _weight(seed=8)
    weight[0, :32] = 0
    weight[1, :32] = top / 64  # fills the codes exactly
    weight[2, :32] = float(np.nextafter(np.float32(top / 64), np.float32(np.inf)))  # and just does not
    slots = FORMATS[weight_format].quantize(weight, True)
    blocks = weight.reshape(OUT, INP // 32, 32).double().numpy()
    amax = np.abs(blocks).max(-1)
    wanted = np.array([[min(b for b in range(255) if a <= top * 2.0 ** (b - 127)) for a in r] for r in amax])
    np.testing.assert_array_equal(slots["block_scale"].numpy(), wanted)
    assert slots["block_scale"][1, 0] == 127 - 6 and slots["block_scale"][2, 0] == 127 - 5
    codes = nearest((blocks / E8M0[wanted][..., None]).reshape(OUT, INP), table)
    packed = {
        "mxfp8": lambda: codes,
        "mxfp6": lambda: pack6(codes),
        "mxfp4": lambda: nibbles(codes, even_high=False),
    }
    np.testing.assert_array_equal(slots["payload"].numpy(), packed[weight_format]())


@pytest.mark.parametrize("weight_format", MX)
def test_an_mx_block_scale_of_255_is_refused(weight_format: str) -> None:
    slots = FORMATS[weight_format].quantize(_weight(), True)
    slots["block_scale"][7, 2] = 255
    with pytest.raises(BadSlot, match="1 of 480 block scales are NaN") as caught:
        FORMATS[weight_format].check(slots)
    assert caught.value.slot == "block_scale"


@pytest.mark.parametrize("weight_format", MX)
def test_every_other_mx_block_scale_is_a_power_of_two(weight_format: str) -> None:
    slots = FORMATS[weight_format].quantize(torch.ones(255, 32), True)
    slots["block_scale"] = torch.arange(255, dtype=torch.uint8).reshape(255, 1)
    FORMATS[weight_format].check(slots)
    ones = TRUTH[weight_format][0]({**slots, "block_scale": torch.full((255, 1), 127, dtype=torch.uint8)})[
        :, :1
    ]
    truth = ones * 2.0 ** (np.arange(255) - 127)[:, None]
    inside = truth[:, 0] <= np.finfo(np.float32).max
    restored = FORMATS[weight_format].dequantize(slots)[:, :1].double().numpy()
    np.testing.assert_array_equal(restored[inside], truth[inside])


def test_e3m2_rounds_as_a_brute_force_search_does() -> None:
    magnitudes = torch.tensor(E3M2[:32]).float()
    ties = (magnitudes[1:] + magnitudes[:-1]) / 2
    near = [
        ties,
        torch.nextafter(ties, ties * 2),
        torch.nextafter(ties, ties * 0),
        torch.linspace(0, 40, 4001),
    ]
    values = torch.cat([*near, magnitudes, torch.tensor([1e-40, 448.0, 1e30])])
    values = torch.cat([values, -values])
    np.testing.assert_array_equal(round_to_e3m2(values).numpy(), nearest(values.double().numpy(), E3M2))


def test_mxfp6_bytes_worked_out_by_hand() -> None:
    """Codes 1, 2, 3, 0x3F: 1 | 2 << 6 = 0x81; 2 >> 2 | 3 << 4 = 0x30; 3 >> 4 | 63 << 2 = 0xFC."""
    payload = torch.tensor([[0x81, 0x30, 0xFC] * 8], dtype=torch.uint8)
    slots = {"payload": payload, "block_scale": torch.tensor([[128]], dtype=torch.uint8)}
    assert FORMATS["mxfp6"].dequantize(slots)[0, :4].tolist() == [0.125, 0.25, 0.375, -56.0]
