"""Quantising in strips: the formats' own bytes under the amax rule, and searched scales against fp64 brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.builders.codes import E2M1, E4M3, E5M2, Floats, nearest
from wan_runtime import quantising
from wan_runtime.corrections import effective_weight
from wan_runtime.formats import FORMATS
from wan_runtime.quantising import FACTORS, HIGHEST, LOWEST, cast, plain_weight, quantise, quantised_weight

TOP = {"fp8": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0}
TABLES = {"fp8": E4M3, "fp8_e5m2": E5M2}
STRIPS = (quantising.STRIP, 96 * 7, 1)  # in one piece; in strips that do not divide the rows; row by row


def weight(out: int = 40, inp: int = 96, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(out, inp, generator=generator) * torch.exp(
        0.5 * torch.randn(out, 1, generator=generator)
    )
    rows[3] = 0
    rows[5, 32:64] = 0
    return rows * 0.02


def squares(values: Floats) -> Floats:
    return np.asarray((values**2).sum(axis=-1))


@pytest.mark.parametrize("strip", STRIPS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", list(FORMATS))
def test_the_amax_rule_gives_the_bytes_of_the_format_itself(
    monkeypatch: pytest.MonkeyPatch, name: str, per_channel: bool, strip: int
) -> None:
    monkeypatch.setattr(quantising, "STRIP", strip)
    whole = weight(out=200, inp=160)  # of blocks of 128 x 128, the last ones are cut short
    slots, error = quantise(plain_weight(whole), name, per_channel=per_channel)
    wanted = FORMATS[name].quantize(whole, per_channel)
    assert slots.keys() == wanted.keys()
    for slot, tensor in wanted.items():
        assert torch.equal(slots[slot], tensor), slot
    off = FORMATS[name].dequantize(wanted).double() - whole.double()
    assert error == pytest.approx(float(off.norm() / whole.double().norm()), rel=1e-6)


@pytest.mark.parametrize("strip", STRIPS)
@pytest.mark.parametrize("name", quantising.SEARCHED)
def test_what_a_search_finds_does_not_depend_on_the_strips(
    monkeypatch: pytest.MonkeyPatch, name: str, strip: int
) -> None:
    wanted, error = quantise(plain_weight(weight()), name, scale="mse")
    monkeypatch.setattr(quantising, "STRIP", strip)
    slots, other = quantise(plain_weight(weight()), name, scale="mse")
    assert all(torch.equal(slots[slot], tensor) for slot, tensor in wanted.items())
    assert other == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_the_searched_fp8_scale_is_the_best_of_the_factors(name: str, per_channel: bool) -> None:
    """Expected: every factor tried in fp64 with the codes nearest by table, row by row or over the tensor."""
    values = weight(seed=1).double().numpy()
    slots, _ = quantise(plain_weight(weight(seed=1)), name, per_channel=per_channel, scale="mse")
    amax = np.abs(values).max(axis=1, keepdims=True) if per_channel else np.abs(values).max().reshape(1, 1)
    base = np.where(amax > 0, (amax / TOP[name]).astype(np.float32), 1).astype(np.float64)
    table = TABLES[name]
    tried = []
    for factor in FACTORS:
        scale = base * np.float32(factor)
        codes = nearest(np.clip(values / scale, -TOP[name], TOP[name]), table)
        errors = squares(table[codes] * scale - values)
        tried.append(errors if per_channel else errors.sum(keepdims=True))
    best, first = np.min(tried, axis=0), tried[0]
    meant = table[slots["payload"].numpy()] * slots["scale"].double().numpy()
    got = squares(meant - values) if per_channel else squares(meant - values).sum(keepdims=True)
    np.testing.assert_allclose(got, best, rtol=1e-5, atol=1e-15)
    assert np.all(got <= first * (1 + 1e-6))
    if name == "fp8":  # and the search is worth something; e5m2's codes are too coarse for it to be
        assert got.sum() < first.sum() * 0.999


def test_the_searched_nvfp4_block_scales_are_the_best_of_the_neighbours() -> None:
    """Expected: every neighbouring e4m3 code of every block tried in fp64."""
    values = weight(seed=2).double().numpy()
    slots, error = quantise(plain_weight(weight(seed=2)), "nvfp4", scale="mse")
    plain, amax_error = quantise(plain_weight(weight(seed=2)), "nvfp4")
    assert torch.equal(slots["scale"], plain["scale"])
    scale, blocks = float(slots["scale"]), values.reshape(40, 6, 16)
    first = plain["block_scale"].numpy().astype(int)
    tried = []
    for offset in range(LOWEST, HIGHEST + 1):
        step = (E4M3[np.clip(first + offset, 1, 0x7E)] * scale)[..., None]
        tried.append(squares(E2M1[nearest(np.clip(blocks / step, -6, 6), E2M1)] * step - blocks))
    step = (E4M3[slots["block_scale"].numpy()] * scale)[..., None]
    packed = slots["payload"].numpy()
    codes = np.stack((packed & 15, packed >> 4), axis=2).reshape(40, 6, 16)
    got = squares(E2M1[codes] * step - blocks)
    np.testing.assert_allclose(got, np.min(tried, axis=0), rtol=1e-5, atol=1e-15)
    assert np.all(got <= tried[-LOWEST] * (1 + 1e-6))
    assert error < amax_error * 0.95


@pytest.mark.parametrize("name", quantising.SEARCHED)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_a_search_keeps_zeros_and_extremes_finite(name: str, size: float) -> None:
    for values in (torch.zeros(4, 32), torch.full((4, 32), size), weight() * size):
        slots, error = quantise(plain_weight(values), name, scale="mse")
        FORMATS[name].check(slots)
        assert np.isfinite(error)
        _, amax_error = quantise(plain_weight(values), name)
        assert error <= amax_error * (1 + 1e-6)


@pytest.mark.parametrize("strip", STRIPS)
@pytest.mark.parametrize("name", list(FORMATS))
def test_a_quantised_source_is_dequantised_in_strips(
    monkeypatch: pytest.MonkeyPatch, name: str, strip: int
) -> None:
    monkeypatch.setattr(quantising, "STRIP", strip)
    for per_channel in (False, True):
        slots = FORMATS[name].quantize(weight(out=256, inp=128), per_channel)
        source = quantised_weight(name, slots, (256, 128))
        dense = cast(source, torch.float32, torch.device("cpu"))
        assert torch.equal(dense, FORMATS[name].dequantize(slots))


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_corrections_are_worked_into_every_strip(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(quantising, "STRIP", 64 * 5)
    generator = torch.Generator().manual_seed(3)
    slots = FORMATS["nvfp4"].quantize(weight(out=64, inp=64), False) | {
        "rotation": torch.tensor([16], dtype=torch.int32),
        "pre_scale": torch.rand(1, 64, generator=generator) + 0.5,
        "low_rank_a": torch.randn(rank, 64, generator=generator),
        "low_rank_b": torch.randn(64, rank, generator=generator),
        "input_scale": torch.ones(1, 1),
    }
    dense = cast(quantised_weight("nvfp4", slots, (64, 64)), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(dense, effective_weight("nvfp4", slots), rtol=1e-5, atol=1e-6)
