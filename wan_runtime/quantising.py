"""Float weights -> a format's slots, a strip of rows at a time, by the amax rule or by a search for the least error.

A strip is small, so that quantising a weight takes little more memory than the weight itself. What is computed does not
depend on how the rows are cut: only an amax and sums of squares go over more than one row, and the sums are added in
fp64 in the rows' order.

amax  scale = largest magnitude / largest code, over the tensor or over each output channel.
mse   fp8 and int8: the amax scale times each of FACTORS, the one with the least squared error. NVFP4: the scale of each
      block is the best of the e4m3 codes from LOWEST below the amax rule's to HIGHEST above it (two thirds to
      one and a half times its scale); the tensor's scale stays amax / 2688. The amax scale is always tried first and
      kept unless another one is better, so the error is never above the amax rule's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from wan_runtime.corrections import effective_weight
from wan_runtime.formats import FORMATS, Slots
from wan_runtime.formats._e2m1 import E2M1, E2M1_MAX, pack, round_to_e2m1
from wan_runtime.formats._scaled import E4M3, E5M2, INT8, Codes, scale_of
from wan_runtime.formats.nvfp4 import BLOCK, E4M3_MAX, SMALLEST_BLOCK_SCALE

SCALES = ("amax", "mse")
STRIP = 2**18  # elements of a strip: 1 MB in fp32, so that what is computed from it stays near the caches
# fp8's codes repeat every octave, so one octave holds every way in which weights and codes can lie; below 1 the largest
# weights are clipped, above it the smallest lose a bit.
FACTORS = (1.0, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.16, 1.22, 1.29, 1.36, 1.43)
LOWEST, HIGHEST = -4, 6
SCALED = {"fp8": E4M3, "fp8_e5m2": E5M2, "int8": INT8}
SEARCHED = (*SCALED, "nvfp4")
WHOLE = ("rotation", "pre_scale", "low_rank_a", "input_scale")  # slots that belong to all rows

Rows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """A weight [out, in] that gives fp32 strips of its rows, `rows(start, stop)`, each `height` rows or the default."""

    shape: tuple[int, int]
    rows: Rows
    height: int | None = None

    def strips(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of strips, by default of at most STRIP elements, or of one row."""
        out, inp = self.shape
        height = self.height or max(STRIP // max(inp, 1), 1)
        return ((start, min(start + height, out)) for start in range(0, out, height))


def plain_weight(tensor: torch.Tensor) -> Weight:
    """An unquantised weight, of any float dtype."""
    return Weight((tensor.shape[0], tensor.shape[1]), lambda start, stop: tensor[start:stop].float())


def quantised_weight(weight_format: str, slots: Slots, shape: tuple[int, int]) -> Weight:
    """A layer's effective weight; dequantised strip by strip where every slot can be cut by rows, else at once."""
    whole = {name for name, tensor in slots.items() if name in WHOLE or tensor.shape[0] == 1}
    cut = slots.keys() - whole
    if any(slots[name].shape[0] != shape[0] for name in cut):  # scales of blocks several rows high
        return plain_weight(effective_weight(weight_format, slots))

    def rows(start: int, stop: int) -> torch.Tensor:
        return effective_weight(weight_format, {**slots, **{name: slots[name][start:stop] for name in cut}})

    return Weight(shape, rows)


def cast(weight: Weight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The whole weight in one dtype."""
    held = torch.empty(weight.shape, dtype=dtype, device=device)
    for start, stop in weight.strips():
        held[start:stop] = weight.rows(start, stop).to(dtype)
    return held


def quantise(
    weight: Weight, weight_format: str, *, per_channel: bool = False, scale: str = "amax"
) -> tuple[dict[str, torch.Tensor], float]:
    """A weight's slots, and their relative L2 error.

    Args:
        weight: finite values [out, in].
        weight_format: any format of the catalogue; scale="mse" is for SEARCHED alone.
        per_channel: one scale an output channel, for the formats that have the choice.
        scale: how scales are chosen, one of SCALES.
    """
    if weight_format in SCALED:
        codes = SCALED[weight_format]
        factor = _scaled_scale(weight, codes, per_channel, scale == "mse")
        encode: Callable[[torch.Tensor, slice], dict[str, torch.Tensor]] = lambda rows, at: {  # noqa: E731
            "payload": _codes(rows, _rows_of(factor, at), codes).view(torch.uint8)
        }
        return _stripped(weight, weight_format, encode, {"scale": factor})
    if weight_format == "nvfp4":
        factor = scale_of(_amax(weight).amax(), E2M1_MAX * E4M3_MAX).reshape(1, 1)
        tried = range(LOWEST, HIGHEST + 1) if scale == "mse" else ()
        return _stripped(weight, "nvfp4", lambda rows, at: _nvfp4(rows, factor, tried), {"scale": factor})
    own, out = FORMATS[weight_format].quantize, weight.shape[0]
    if any(shapes[0][0] != out for _, shapes in FORMATS[weight_format].layout(*weight.shape).values()):
        weight = dataclasses.replace(
            weight, height=out
        )  # a scale covers several rows, so all are quantised at once
    return _stripped(weight, weight_format, lambda rows, at: own(rows, True), {})


def _stripped(
    weight: Weight,
    weight_format: str,
    encode: Callable[[torch.Tensor, slice], dict[str, torch.Tensor]],
    shared: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], float]:
    """Encode strip by strip; `shared` are slots of the whole weight, by tensor or by row."""
    parts: dict[str, list[torch.Tensor]] = {}
    off, size = 0.0, 0.0
    for start, stop in weight.strips():
        rows, at = weight.rows(start, stop), slice(start, stop)
        slots = encode(rows, at)
        meant = FORMATS[weight_format].dequantize(
            {**slots, **{name: _rows_of(tensor, at) for name, tensor in shared.items()}}
        )
        off += float(_squares(meant.sub_(rows)).sum())
        size += float(_squares(rows).sum())
        for name, tensor in slots.items():
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()} | shared, (
        (off / size) ** 0.5 if size > 0 else 0.0
    )


def _squares(values: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each row, fp64."""
    return values.double().square_().sum(1)


def _rows_of(scale: torch.Tensor, at: slice) -> torch.Tensor:
    return scale if scale.shape[0] == 1 else scale[at]


def _amax(weight: Weight) -> torch.Tensor:
    """Largest magnitude of each row, fp32 [out, 1]."""
    return torch.cat([weight.rows(*at).abs().amax(1, keepdim=True) for at in weight.strips()])


def _scaled_scale(weight: Weight, codes: Codes, per_channel: bool, search: bool) -> torch.Tensor:
    """fp32 [1, 1] or [out, 1]."""
    amax = _amax(weight)
    scale = scale_of(amax if per_channel else amax.amax().reshape(1, 1), codes.top)
    if not search:
        return scale
    errors = torch.cat(
        [_errors(weight.rows(*at), _rows_of(scale, slice(*at)), codes) for at in weight.strips()], 1
    )
    best = (errors if per_channel else errors.sum(1, keepdim=True)).argmin(
        0
    )  # of equal ones the first: amax's own
    return scale * torch.tensor(FACTORS, device=scale.device)[best].reshape(-1, 1)


def _errors(rows: torch.Tensor, scale: torch.Tensor, codes: Codes) -> torch.Tensor:
    """Squared error of each row under each factor, fp64 [factors, rows]."""
    return torch.stack(
        [
            _squares(_codes(rows, scale * factor, codes).float().mul_(scale * factor).sub_(rows))
            for factor in FACTORS
        ]
    )


def _codes(rows: torch.Tensor, scale: torch.Tensor, codes: Codes) -> torch.Tensor:
    quotient = (rows / scale).clamp_(-codes.top, codes.top)
    return (quotient.round_() if codes.dtype is torch.int8 else quotient).to(codes.dtype)


def _nvfp4(rows: torch.Tensor, scale: torch.Tensor, tried: range | tuple[()]) -> dict[str, torch.Tensor]:
    """Codes and block scales of some rows under the tensor's scale."""
    out, inp = rows.shape
    blocks = rows.reshape(out, inp // BLOCK, BLOCK)
    wanted = (blocks.abs().amax(-1) / E2M1_MAX / scale).clamp(SMALLEST_BLOCK_SCALE, E4M3_MAX)
    byte = wanted.to(torch.float8_e4m3fn).view(torch.uint8)
    codes, error = _nvfp4_codes(blocks, byte, scale, bool(tried))
    first = byte.to(torch.int16)
    for offset in tried:
        other = (first + offset).clamp(1, 0x7E).to(torch.uint8)
        other_codes, other_error = _nvfp4_codes(blocks, other, scale, True)
        better = other_error < error
        byte = torch.where(better, other, byte)
        codes = torch.where(better[..., None], other_codes, codes)
        error = torch.where(better, other_error, error)
    return {"payload": pack(codes.reshape(out, inp)), "block_scale": byte}


def _nvfp4_codes(
    blocks: torch.Tensor, byte: torch.Tensor, scale: torch.Tensor, measured: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of blocks under their scales' bytes, and where asked the squared error of each block."""
    step = (byte.view(torch.float8_e4m3fn).float() * scale)[..., None]
    codes = round_to_e2m1(blocks / step)
    if not measured:
        return codes, codes
    signed = torch.tensor(E2M1 + tuple(-value for value in E2M1), device=blocks.device)
    values = signed.index_select(0, codes.flatten().to(torch.int32)).reshape(codes.shape)
    return codes, values.mul_(step).sub_(blocks).square_().sum(-1)
