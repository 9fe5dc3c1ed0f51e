"""ggml's weight types against the gguf package's own numpy code, over random bytes of every block."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES

from wan_runtime.errors import UnknownName
from wan_runtime.formats import FORMATS, BadSlot
from wan_runtime.formats._ggml import BLOCKS

OUT, INP = 24, 768


def _type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def _payload(name: str, seed: int = 0) -> torch.Tensor:
    """Random bytes, but fp16 numbers that are finite."""
    block = BLOCKS[name]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (OUT * INP // block.weights, block.nbytes), dtype=np.uint8)
    for at in block.halves:
        halves = generator.normal(0, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8)
    return torch.from_numpy(blocks.reshape(OUT, -1))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_code_means_what_ggml_says(name: str) -> None:
    payload = _payload(name)
    slots = {"payload": payload}
    weight_format = FORMATS[f"ggml_{name}"]
    weight_format.check(slots)
    assert tuple(payload.shape) in weight_format.layout(OUT, INP)["payload"][1]
    ours: torch.Tensor = weight_format.dequantize(slots)
    truth = gguf.quants.dequantize(payload.numpy(), _type(name))
    assert (ours.dtype, tuple(ours.shape), truth.shape) == (torch.float32, (OUT, INP), (OUT, INP))
    np.testing.assert_array_equal(ours.numpy(), truth)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_sizes_of_a_block_are_ggml_s(name: str) -> None:
    block = BLOCKS[name]
    assert (block.weights, block.nbytes) == GGML_QUANT_SIZES[_type(name)]
    assert FORMATS[f"ggml_{name}"].bits == 8 * block.nbytes / block.weights
    assert str(block.weights + 16) in str(FORMATS[f"ggml_{name}"].refuses(64, block.weights + 16))
    assert FORMATS[f"ggml_{name}"].refuses(64, block.weights * 3) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_scale_that_is_no_number_is_refused(name: str, value: float) -> None:
    block = BLOCKS[name]
    for at in block.halves:
        payload = _payload(name)
        payload[3, at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
        with pytest.raises(BadSlot, match="1 of its blocks' scales"):
            FORMATS[f"ggml_{name}"].check({"payload": payload})


def test_they_are_found_by_name_and_not_offered_to_quantise_to() -> None:
    assert not any(name.startswith("ggml") for name in FORMATS)
    with pytest.raises(UnknownName, match="no format named 'ggml_iq4_xs'"):
        FORMATS["ggml_iq4_xs"]
    with pytest.raises(NotImplementedError, match="not written"):
        FORMATS["ggml_q4_0"].quantize(torch.zeros(32, 32), False)
