"""torch's own kernels: FP8 products through `torch._scaled_mm`, NVFP4 and MXFP8 products where the GPU has them
(_block_scaled.py), and dequantise-then-multiply on a CPU or an NVIDIA GPU.

FP8: activations are quantised with one dynamic scale a token by a fused kernel, weights keep their own scales, and the
product is accumulated in the tensor cores' fast mode and returned in bf16; where a GPU does not take such scales,
they are applied to the product (_granularity.py). Without FP4 products NVFP4 weights stay 4-bit in memory and are
expanded a layer at a time to FP8, so on Hopper and Ada they multiply at FP8 speed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from wan_runtime.backends import (
    Added,
    Backend,
    Biased,
    Coded,
    Multiply,
    _block_scaled,
    _cublaslt,
    _granularity,
)
from wan_runtime.formats import FORMATS, Slots

WeightOf = Callable[[Slots], tuple[torch.Tensor, torch.Tensor]]
FP8_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# Of what (out, in) must be multiples: _scaled_mm's rule, and the blocks'.
ALIGNMENT = {"fp8": (16, 16), **_block_scaled.COMPUTES}


def computes(weight_format: str) -> tuple[str, ...]:
    as_it_is = (weight_format,) if weight_format in _block_scaled.COMPUTES else ()
    fp8 = ("fp8",) if weight_format in (*FP8_DTYPES, "nvfp4") else ()
    return (*as_it_is, *fp8, "bf16")


def refuses(weight_format: str, compute: str, device: torch.device, shape: tuple[int, int]) -> str | None:
    if compute not in computes(weight_format):
        return f"it has no {compute} product for {weight_format} weights"
    untried = _untried(device)
    if untried is not None:
        return f"it has never been tried on {untried}; backend='reference' multiplies there, in fp32"
    if compute == "bf16":
        return None
    kind = compute.upper()
    if device.type != "cuda":
        return f"{kind} products need a CUDA GPU; the model is on {device.type}"
    out, inp = ALIGNMENT[compute]
    if shape[0] % out or shape[1] % inp:
        rule = f"multiples of {out}" if out == inp else f"multiples of {out} and {inp}"
        return f"{kind} products need dimensions that are {rule}; the weight is {shape[0]} x {shape[1]}"
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _probe(weight_format, index) if compute == "fp8" else _block_scaled.refuses(compute, index)


def _untried(device: torch.device) -> str | None:
    """The kind of device, in words, where this project has run nothing; None for a CPU and an NVIDIA GPU."""
    if device.type == "cuda":
        return "an AMD GPU (ROCm)" if torch.version.hip is not None else None
    return None if device.type in ("cpu", "meta") else f"a device of type {device.type!r}"


@functools.cache
def _probe(weight_format: str, index: int) -> str | None:
    """Run one tiny product on the GPU: the only proof that it can."""
    device = torch.device("cuda", index)
    refusal = _granularity.refuses(index)
    if refusal is not None:
        return refusal
    rows = torch.randn(32, 32, device=device, dtype=torch.bfloat16)
    slots = FORMATS[weight_format].quantize(torch.randn(32, 32, device=device), True)
    try:
        product = kernel(weight_format, "fp8")(rows, slots, None)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever the driver, Triton or cuBLAS says is the reason shown to the user
        return f"a test product failed on {torch.cuda.get_device_name(device)}: {str(error).splitlines()[0][:200]}"
    if not bool(torch.isfinite(product).all()):
        return f"a test product gave NaN or infinity on {torch.cuda.get_device_name(device)}"
    _cublaslt.refuses(index)  # asked now, for `added` and `remark`
    return None


def remark(device: torch.device) -> str | None:
    """What a user reads of FP8 products on a device that multiplies otherwise than the fastest way, or None."""
    remarks = (_granularity.remark(device), _cublaslt.remark(device))
    return " ".join(said for said in remarks if said is not None) or None


def kernel(weight_format: str, compute: str) -> Multiply:
    if compute == "bf16":
        # Looked up here and not in the product: a forward must not search the catalogue, and torch.compile cannot.
        return functools.partial(_dequantise_and_multiply, FORMATS[weight_format].dequantize)
    if compute in _block_scaled.COMPUTES:
        return functools.partial(_block_scaled.multiply, compute)
    # An NVFP4 input scale is amax / 2688; an FP8 one of the same amax is 6 times larger.
    return functools.partial(_fp8, _weight_of(weight_format), 6 if weight_format == "nvfp4" else 1)


def _dequantise_and_multiply(
    dequantize: Callable[[Slots], torch.Tensor],
    rows: torch.Tensor,
    slots: Slots,
    static: torch.Tensor | None,
) -> torch.Tensor:
    weight = dequantize(slots).to(rows.dtype)
    return torch.nn.functional.linear(rows, weight)


def coded(weight_format: str, compute: str) -> Coded | None:
    if compute in _block_scaled.COMPUTES:
        return functools.partial(_block_scaled.coded, compute)
    if compute != "fp8":
        return None
    return functools.partial(_coded, _weight_of(weight_format))


def added(weight_format: str, compute: str) -> Added | None:
    if compute != "fp8":
        return None
    return Added(_cublaslt.takes, functools.partial(_add, _weight_of(weight_format)))


def _weight_of(weight_format: str) -> WeightOf:
    """slots -> weight codes [out, in] and their scales, one for all or one a channel."""
    if weight_format == "nvfp4":
        return _expanded
    return functools.partial(_stored, FP8_DTYPES[weight_format])


def _stored(dtype: torch.dtype, slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
    return slots["payload"].view(dtype), slots["scale"]


def _expanded(slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
    from wan_runtime.kernels.expand_nvfp4 import expand_nvfp4

    return expand_nvfp4(slots["payload"], slots["block_scale"], slots["scale"])


def _add(
    weight_of: WeightOf, codes: torch.Tensor, token_scale: torch.Tensor,
    slots: Slots, factor: torch.Tensor | None, into: torch.Tensor,
) -> None:  # fmt: skip
    if not codes.shape[0]:  # cuBLAS refuses an empty product
        return
    weight, scale = weight_of(slots)
    each = scale.reshape(-1)
    each = each.expand(weight.shape[0]).contiguous() if factor is None else each * factor
    _cublaslt.add(codes, token_scale, weight, each, into)


def biased(weight_format: str, compute: str) -> Biased | None:
    function = kernel(weight_format, compute)
    return None if compute == "bf16" else function  # type: ignore[return-value]  # its bias is optional


def _coded(
    weight_of: WeightOf, codes: torch.Tensor, token_scale: torch.Tensor,
    slots: Slots, whole: torch.Tensor | None = None, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    weight, scale = weight_of(slots)
    return _scaled_mm(codes, token_scale, weight, scale, bias)


def _fp8(
    weight_of: WeightOf, static_factor: int, rows: torch.Tensor,
    slots: Slots, static: torch.Tensor | None, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    codes, token_scale = _quantised(rows, None if static is None else static * static_factor)
    return _coded(weight_of, codes, token_scale, slots, bias=bias)


def _quantised(rows: torch.Tensor, static: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [tokens, in] -> e4m3 codes and their scale [tokens, 1]: one a token, or the file's for all."""
    if static is not None:
        codes = (rows.float() / static).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes, static.expand(rows.shape[0], 1).contiguous()
    from wan_runtime.kernels.quantize_rows import quantize_rows

    return quantize_rows(rows)


def _scaled_mm(
    codes: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """codes [tokens, in] x weight codes [out, in], and a bf16 bias [out] -> bf16 [tokens, out]."""
    if not codes.shape[0]:  # cuBLAS refuses an empty product
        return torch.empty(0, weight.shape[0], dtype=torch.bfloat16, device=codes.device)
    channel_scale = scale.reshape(1, -1).expand(1, weight.shape[0]).contiguous()
    return _granularity.product_on(codes.device)(codes, token_scale, weight, channel_scale, bias)


BACKEND = Backend(
    name="torch",
    computes=computes,
    refuses=refuses,
    kernel=kernel,
    coded=coded,
    added=added,
    biased=biased,
    remark=remark,
)
